# SPDX-License-Identifier: MIT
"""Merge as scatter-adds: what the fused kernels must equal. Its gradients are autograd's."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.dtypes import accumulator_of


def merge(
    x: Tensor, weight: Tensor | None, dest: Tensor, num_out: int, reduce: str, weight_sum: bool
) -> tuple[Tensor, Tensor | None]:
    """See `ops.merge`: y (B, N', C), and the (B, N') sums of weights where they are wanted."""
    batch, _, channels = x.shape
    accumulator = accumulator_of(x)
    slot = torch.where(dest < 0, num_out, dest).long()[..., None]  # what is dropped goes to one slot more, cut off last
    values = x.to(accumulator)
    if reduce == "amax":
        return _largest(values, slot, num_out).to(x.dtype), None

    ones = values.new_ones(batch, dest.shape[1], 1)
    column = values.new_zeros(batch, num_out + 1, 1)
    count = column.scatter_add(1, slot, ones)[:, :num_out]
    total = count if weight is None else column.scatter_add(1, slot, weight[..., None])[:, :num_out]
    if weight is not None:
        values = values * weight[..., None]
    sums = values.new_zeros(batch, num_out + 1, channels).scatter_add(1, slot.expand(-1, -1, channels), values)
    y = sums[:, :num_out]
    if reduce == "mean":
        y = y / torch.where(count > 0, total, 1.0)  # a slot without members stays 0
    return y.to(x.dtype), total[..., 0] if weight_sum else None


def _largest(values: Tensor, slot: Tensor, num_out: int) -> Tensor:
    """The maximum of each slot, (B, N', C); one without members is 0.

    Its gradient goes to the members that have the maximum, a NaN among them where it is NaN, in equal shares. That of
    torch's scatter_reduce is NaN there, so the maximum has none, and the mean of those that have it takes its place.
    """
    batch, _, channels = values.shape
    index = slot.expand(-1, -1, channels)
    none = values.new_zeros(batch, num_out + 1, channels)
    fixed = values.detach()
    largest = (none - torch.inf).scatter_reduce(1, index, fixed, "amax", include_self=True)
    own = largest.gather(1, index)
    having = (fixed == own) | (fixed.isnan() & own.isnan())
    number = none.scatter_add(1, index, having.to(values.dtype)).clamp_min(1)

    def share(part: Tensor) -> Tensor:
        return none.scatter_add(1, index, torch.where(having, part, 0.0)) / number

    # Where it is finite the mean is rounded, or past what the dtype has; and infinity less itself is NaN.
    return torch.where(largest.isfinite(), largest + share(values - fixed), share(values))[:, :num_out]
