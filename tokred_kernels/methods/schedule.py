# SPDX-License-Identifier: MIT
"""Which blocks remove tokens, and how many."""

from __future__ import annotations

from itertools import pairwise
from numbers import Integral
from typing import Any

from tokred_kernels.checks import check_count
from tokred_kernels.ops.counts import check_count_mode

ACCEPTED = "an int, a list with one int a block, or a pair (r, inflect) of an int and a number from -1 to 1"


def removed_per_block(r: Any, num_blocks: int) -> list[int]:
    """The schedule that `r` means for `num_blocks` blocks, as ToMe reads it.

    Args:
        r: an int, for each block; a list with one int a block (ToMe's authors pad a shorter one with zeros; here it
            raises); or `(r, inflect)`: from r (1 - inflect) to r (1 + inflect) in equal steps, each cut to a whole
            number.
        num_blocks: of the model.

    Raises:
        TypeError: `r`, or a part of it, is of another type.
        ValueError: a negative number, an inflection outside [-1, 1], or a list of another length than the model's.
    """
    if isinstance(r, list):
        if len(r) != num_blocks:
            raise ValueError(
                f"tokred_kernels.patch: r must have one entry for each of the model's {num_blocks} blocks, got "
                f"{len(r)}; give 0 for a block that removes nothing"
            )
        return [_whole(f"r[{index}]", value) for index, value in enumerate(r)]
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


def merging_layers(layers: Any, num_blocks: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return `layers`, numbers of blocks counted from 1 in ascending order. An error says if they are the `default`.

    Raises:
        TypeError: no tuple or list, or a part that is no int.
        ValueError: none at all, one that the model does not have, or not in ascending order.
    """
    return _blocks(layers, 1, num_blocks, default)


def reducing_blocks(layers: Any, num_blocks: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return `layers`, indices of blocks counted from 0; see `merging_layers`."""
    return _blocks(layers, 0, num_blocks - 1, default)


def _blocks(layers: Any, first: int, last: int, default: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(layers, (tuple, list)):
        raise TypeError(f"tokred_kernels.patch: layers must be a tuple of ints, got {layers!r}")
    if not layers:
        raise ValueError("tokred_kernels.patch: layers must name at least one block, got none")
    for layer in layers:
        check_count("patch", "layers", layer, least=first)
    if layers[-1] > last:
        advice = f" from the default layers={default}; give layers for this model" if layers == default else ""
        raise ValueError(
            f"tokred_kernels.patch: layers must be from {first} to {last}, the model's last block, got {layers[-1]}"
            + advice
        )
    if any(after <= before for before, after in pairwise(layers)):
        raise ValueError(f"tokred_kernels.patch: layers must ascend, got {tuple(layers)}")
    return tuple(layers)


def share_per_layer(name: str, share: Any, num_layers: int, default: Any = None) -> list[float]:
    """Return the share of tokens to keep in each layer, given one share for all or a list with one share a layer.

    An error says if `share` is the `default`.

    Raises:
        TypeError: something else than numbers.
        ValueError: one that is not above 0 and at most 1, or a list of another length.
    """
    shares = list(share) if isinstance(share, (tuple, list)) else [share] * num_layers
    if len(shares) != num_layers:
        advice = f" from the default {name}={default}; give {name} for these layers" if share == default else ""
        raise ValueError(
            f"tokred_kernels.patch: {name} must have one number for each of {num_layers} layers, got {len(shares)}"
            + advice
        )
    for value in shares:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"tokred_kernels.patch: {name} must be a number, or a list of numbers, got {share!r}")
        if not 0 < value <= 1:
            raise ValueError(f"tokred_kernels.patch: {name} must be above 0 and at most 1, got {value}")
    return shares


def as_text(share: float) -> str:
    """A share as a step carries it, to be read by `float`.

    torch.compile takes a float that has changed for a variable, and breaks where a number of tokens is made from it in
    front of an autograd.Function. Text is a constant, and another one compiles anew.
    """
    return repr(float(share))


def count_per_layer(count: Any, num_layers: int, group: Any = None) -> list[int | str]:
    """The `count=` of an adaptive selector in each of `num_layers` layers, from one for all, or a list of ints.

    Raises:
        TypeError: a list that holds something else than ints, or `count` is of another type.
        ValueError: an unknown name, a negative number, a list of another length, or a group without "batch".
    """
    if isinstance(count, (tuple, list)):
        if len(count) != num_layers:
            raise ValueError(
                f"tokred_kernels.patch: count must have an int for each of {num_layers} layers, got {len(count)}"
            )
        for index, number in enumerate(count):
            check_count("patch", f"count[{index}]", number)
            check_count_mode("patch", number, group)
        return list(count)
    check_count_mode("patch", count, group)
    return [count] * num_layers


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"tokred_kernels.patch: r must be {ACCEPTED}, got {name} of type {type(value).__name__} ({value!r})"
        )
    if value < 0:
        raise ValueError(f"tokred_kernels.patch: r must not be negative, got {name} = {value}")
    return int(value)
