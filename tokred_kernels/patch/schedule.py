# SPDX-License-Identifier: MIT
"""How many tokens each block removes."""

from __future__ import annotations

from numbers import Integral
from typing import Any

ACCEPTED = "an int, a list with one int a block, or a pair (r, inflect) of an int and a number from -1 to 1"


def removed_per_block(r: Any, num_blocks: int) -> list[int]:
    """The schedule that `r` means for `num_blocks` blocks, as ToMe reads it.

    Args:
        r: an int, for each block; a list, padded with zeros; or `(r, inflect)`: from r (1 - inflect) to r (1 + inflect)
            in equal steps, each cut to a whole number.
        num_blocks: of the model.

    Raises:
        TypeError: `r`, or a part of it, is of another type.
        ValueError: a negative number, an inflection outside [-1, 1], or a list longer than the model is deep.
    """
    if isinstance(r, list):
        if len(r) > num_blocks:
            raise ValueError(
                f"tokred_kernels.patch: r has {len(r)} entries and the model {num_blocks} blocks; give at most "
                "one for each"
            )
        return [_whole(f"r[{index}]", value) for index, value in enumerate(r)] + [0] * (num_blocks - len(r))
    if not isinstance(r, tuple):
        return [_whole("r", r)] * num_blocks
    if len(r) != 2:
        raise ValueError(f"tokred_kernels.patch: r must be {ACCEPTED}, got a tuple of {len(r)}; lists go in []")
    base, inflect = _whole("r[0]", r[0]), r[1]
    if isinstance(inflect, bool) or not isinstance(inflect, (int, float)):
        raise TypeError(f"tokred_kernels.patch: r must be {ACCEPTED}, got inflect {inflect!r}")
    if not -1 <= inflect <= 1:
        raise ValueError(f"tokred_kernels.patch: inflect must be from -1 to 1, got {inflect}")
    first = int(base * (1.0 - inflect))
    step = (2 * base - 2 * first) / max(num_blocks - 1, 1)
    return [int(first + step * index) for index in range(num_blocks)]


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"tokred_kernels.patch: r must be {ACCEPTED}, got {name} of type {type(value).__name__} ({value!r})"
        )
    if value < 0:
        raise ValueError(f"tokred_kernels.patch: r must not be negative, got {name} = {value}")
    return int(value)
