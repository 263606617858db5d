# SPDX-License-Identifier: MIT
"""Merge as segment reductions; the fused kernels must give the same result. Its gradients are autograd's."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.reference.segments import Segments
from tokred_kernels.dtypes import accumulator_of


def merge(
    x: Tensor, weight: Tensor | None, dest: Tensor, num_out: int, reduce: str, weight_sum: bool
) -> tuple[Tensor, Tensor | None]:
    """See `ops.merge`: y (B, N', C), and the (B, N') sums of weights if `weight_sum`."""
    values = x.to(accumulator_of(x))
    segments = Segments(dest, num_out)
    if reduce == "amax":
        return _largest(values, segments)[:, :num_out].to(x.dtype), None

    count = segments.sum(values.new_ones(*dest.shape, 1))
    total = count if weight is None else segments.sum(weight[..., None])
    if weight is not None:
        # Tokens that cannot reach the result are masked first: 0 * NaN would be NaN, forward and backward.
        counted = (dest >= 0)[..., None]
        if reduce == "mean":
            counted = counted & (segments.spread(total.detach()) != 0)
        values = torch.where(counted, values, 0.0) * weight[..., None]
    y = segments.sum(values)
    if reduce == "mean":
        y = y / torch.where(total == 0, 1.0, total)  # a slot without members, or whose weights sum to 0, stays 0
    return y[:, :num_out].to(x.dtype), total[:, :num_out, 0] if weight_sum else None


def _largest(values: Tensor, segments: Segments) -> Tensor:
    """Return the maximum of each slot, 0 for an empty slot.

    The gradient goes in equal shares to the members equal to the maximum, or to the NaN members if it is NaN. The
    gradient of torch's scatter_reduce is NaN in that case, so the maximum itself carries none: it is the mean of those
    members that is differentiated.
    """
    fixed = values.detach()
    largest = segments.max(fixed)
    own = segments.spread(largest)
    having = (fixed == own) | (fixed.isnan() & own.isnan())
    number = segments.sum(having.to(values.dtype)).clamp_min(1)

    def share(part: Tensor) -> Tensor:
        return segments.sum(torch.where(having, part, 0.0)) / number

    # A finite maximum is added exactly, as the mean could be rounded or overflow. infinity - infinity would be NaN.
    return torch.where(largest.isfinite(), largest + share(values - fixed), share(values))
