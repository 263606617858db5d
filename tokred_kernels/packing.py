# SPDX-License-Identifier: MIT
"""Packing: the layout of images of several lengths in one tensor."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred_kernels.checks import MAX_ROWS, check_count, check_dense, check_device, shape
from tokred_kernels.torch_state import can_bypass_dispatcher


class Packing(NamedTuple):
    """The layout of images of several lengths, one after the other in one tensor, as in variable-length attention.

    Attributes:
        cu_seqlens: (B + 1,) int32, the first row of each image, and the end of the last one.
        lengths: the number of rows of each image, on the host.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths: tuple[int, ...], device: torch.device) -> Packing:
        """Return the packing of images of these lengths.

        Raises:
            TypeError: `lengths` is not a tuple of ints, or `device` is not a device.
            ValueError: a negative length, too many rows in all, or an unknown `device`.
        """
        check_lengths("Packing.of", "lengths", lengths)
        device = check_device("Packing.of", device)
        starts = torch.tensor((0, *lengths), dtype=torch.int32, device="cpu").cumsum(0, dtype=torch.int32)
        return cls(starts.to(device), lengths)

    @property
    def rows(self) -> int:
        """The total number of rows."""
        return sum(self.lengths)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Packing:
        """Return the packing with its tensor on `device`; raise TypeError or ValueError unless that is one."""
        device = check_device("Packing.to", device)
        return Packing(self.cu_seqlens.to(device, non_blocking=non_blocking), self.lengths)


def check_lengths(op: str, name: str, lengths: Any) -> None:
    """Raise unless `lengths` is a tuple of row counts, at most `MAX_ROWS` in all."""
    if not isinstance(lengths, tuple):
        raise TypeError(f"tokred_kernels.{op}: {name} must be a tuple of ints, got {type(lengths).__name__}")
    if all(type(length) is int for length in lengths) and min(lengths, default=0) >= 0:
        total = sum(lengths)
    else:
        total = sum(check_count(op, name, length) for length in lengths)
    if total > MAX_ROWS:
        raise ValueError(f"tokred_kernels.{op}: {name} must have a sum of at most {MAX_ROWS}")


def check_packing(op: str, packed: Any) -> Packing:
    """Return `packed` with a contiguous tensor; raise unless it is a valid Packing.

    The tensor's entries are compared with the lengths only on a CPU and outside graphs, since that costs nothing.
    """
    if not isinstance(packed, Packing):
        raise TypeError(f"tokred_kernels.{op}: packed must be a Packing, got {type(packed).__name__}")
    starts, lengths = packed
    if not isinstance(starts, Tensor) or starts.dtype != torch.int32:
        got = starts.dtype if isinstance(starts, Tensor) else type(starts).__name__
        raise TypeError(f"tokred_kernels.{op}: packed.cu_seqlens must be an int32 tensor, got {got}")
    check_lengths(op, "packed.lengths", lengths)
    check_dense(op, "packed.cu_seqlens", starts)
    if starts.shape != (len(lengths) + 1,):
        raise ValueError(
            f"tokred_kernels.{op}: packed.cu_seqlens must be ({len(lengths) + 1},), one more than packed.lengths has, "
            f"got shape {shape(starts)}"
        )
    if starts.is_cpu and can_bypass_dispatcher(starts):
        found = starts.tolist()
        if found != list(accumulate(lengths, initial=0)):
            raise ValueError(
                f"tokred_kernels.{op}: packed.cu_seqlens must be where images of packed.lengths = {lengths} start and "
                f"end, got {found}"
            )
    return packed if starts.is_contiguous() else Packing(starts.contiguous(), lengths)
