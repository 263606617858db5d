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
        # From -inf, not from 0 with include_self=False: there torch counts the 0 among the ties of its gradient.
        lowest = values.new_full((batch, num_out + 1, channels), -torch.inf)
        index = slot.expand(-1, -1, channels)
        y = lowest.scatter_reduce(1, index, values, "amax", include_self=True)[:, :num_out]
        filled = values.new_zeros(batch, num_out + 1, 1).scatter(1, slot, 1.0)[:, :num_out]
        return torch.where(filled > 0, y, 0.0).to(x.dtype), None

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
