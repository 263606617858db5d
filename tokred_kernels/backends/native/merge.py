# SPDX-License-Identifier: MIT
"""Merge, on the CPU and on CUDA."""

from __future__ import annotations

from torch import Tensor

from tokred_kernels.backends.native import (
    DTYPE_CODE,
    REDUCE_CODE,
    address,
    empty_result,
    kernels,
    rows,
    stream,
)
from tokred_kernels.dtypes import accumulator_of


def merge(
    x: Tensor,
    weight: Tensor | None,
    members: Tensor,
    begin: Tensor,
    count: Tensor,
    reduce: str,
    weight_sum: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.merge`: y (B, N', C), and sums of weights (B, N'), empty unless `weight_sum`."""
    x = rows(x)
    images, tokens, channels = x.shape
    batch, num_out = begin.shape
    if count.numel() != batch * num_out:
        raise ValueError(f"tokred_kernels.merge: count must have the shape of begin, got {count.shape}, {begin.shape}")
    y = empty_result(x, (batch, num_out, channels))
    accumulator = accumulator_of(x)
    sums = x.new_empty(batch, num_out, dtype=accumulator) if weight_sum else x.new_empty(0, dtype=accumulator)
    kernels(x).merge(
        *(x.data_ptr(), x.stride(1), address(weight), members.data_ptr(), begin.data_ptr(), count.data_ptr()),
        *(y.data_ptr(), sums.data_ptr() if weight_sum else 0, batch * num_out, channels),
        *(DTYPE_CODE[x.dtype], REDUCE_CODE[reduce], images * tokens, members.numel(), stream(x)),
    )
    return y, sums
