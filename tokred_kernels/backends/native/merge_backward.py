# SPDX-License-Identifier: MIT
"""The gradients of merge, on the CPU and on CUDA."""

from __future__ import annotations

from torch import Tensor

from tokred_kernels.backends.native import (
    DTYPE_CODE,
    REDUCE_CODE,
    address,
    check_indices,
    empty_result,
    kernels,
    rows,
    stream,
)
from tokred_kernels.dtypes import accumulator_of


def merge_backward(
    grad_y: Tensor,
    grad_weight_sum: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    weight_sum: Tensor | None,
    dest: Tensor,
    members: Tensor,
    begin: Tensor,
    count: Tensor,
    reduce: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.merge`: the gradients of x (B, N, C) and weight (B, N), each empty if it is not needed."""
    check_indices("merge_backward", grad_y, dest)
    grad_y = grad_y.contiguous()
    if grad_weight_sum is not None:
        grad_weight_sum = grad_weight_sum.contiguous()
    if x is not None:
        x = rows(x)
    (batch, tokens), (_, num_out, channels) = dest.shape, grad_y.shape
    if not begin.shape == count.shape == (batch, num_out) == grad_y.shape[:2]:
        raise ValueError(
            f"tokred_kernels.merge_backward: dest, begin, count and grad_y must be of one map and batch, "
            f"got {dest.shape}, {begin.shape}, {count.shape} and {grad_y.shape}"
        )
    accumulator = accumulator_of(grad_y)
    grad_x = empty_result(grad_y, (batch, tokens, channels) if need_x else (0,))
    grad_weight = grad_y.new_empty((batch, tokens) if need_weight else (0,), dtype=accumulator)
    kernels(grad_y).merge_backward(
        *(grad_y.data_ptr(), address(grad_weight_sum), address(x), 0 if x is None else x.stride(1), address(y)),
        *(address(weight), address(weight_sum), dest.data_ptr()),
        *(members.data_ptr(), begin.data_ptr(), count.data_ptr()),
        *(grad_x.data_ptr() if need_x else 0, grad_weight.data_ptr() if need_weight else 0),
        *(batch, tokens, num_out, channels, DTYPE_CODE[grad_y.dtype], REDUCE_CODE[reduce]),
        *(members.numel(), stream(grad_y)),
    )
    return grad_x, grad_weight
