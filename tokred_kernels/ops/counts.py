# SPDX-License-Identifier: MIT
"""The `count` argument of adaptive selectors: one number for the batch, one for each image, or a given number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred_kernels.checks import check_count, check_real
from tokred_kernels.packing import Packing

BATCH, IMAGE = "batch", "image"


def check_count_mode(op: str, count: Any, group: Any) -> int | str:
    """Return `count`; raise unless it is "batch", "image" or an int of at least 0, and `group` is valid with it."""
    if not isinstance(count, str):
        count = check_count(op, "count", count)
    elif count not in (BATCH, IMAGE):
        raise ValueError(f'tokred_kernels.{op}: count must be "batch", "image" or an int, got {count[:80]!r}')
    if group is not None and count != BATCH:
        raise ValueError(
            f'tokred_kernels.{op}: group must be None unless count="batch": processes share only the count of a batch, '
            f"got count={count!r}"
        )
    if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"tokred_kernels.{op}: group must be a torch.distributed.ProcessGroup, got {type(group).__name__}"
        )
    return count


def check_threshold(op: str, threshold: Any) -> float:
    """Return `threshold` as a float; raise unless it is a number other than NaN."""
    return check_real(op, "threshold", threshold, infinite=True)


def check_readable(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError if `tensor` is on the meta device, where counts cannot be computed."""
    if tensor.is_meta:
        raise ValueError(f"tokred_kernels.{op}: {name} is on meta, and has no values to count; give an int for count")


def smallest(counts: Tensor, group: Any = None) -> int:
    """Return the smallest of the images' counts (B,) int32, over all processes of `group` if it is given.

    Reads the counts back to the host, or with a group their minimum.
    """
    if group is None:
        return min(counts.tolist(), default=0)
    # A process without images must not lower the minimum of the others.
    none = torch.iinfo(counts.dtype).max
    lowest = counts.min() if counts.numel() else counts.new_tensor(none)
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, group=group)
    number = int(lowest)
    return 0 if number == none else number


def packing_after(lengths: tuple[int, ...], counts: Tensor, each: int = 1) -> Packing:
    """Return the packing of images with these lengths after image b has lost `each * counts[b]` tokens.

    Reads the counts back to the host.
    """
    remaining = (length - each * number for length, number in zip(lengths, counts.tolist(), strict=True))
    return Packing.of(tuple(remaining), counts.device)
