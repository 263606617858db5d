# SPDX-License-Identifier: MIT
"""The gradients of token attention, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.native import address, empty_result, kernels, stream
from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.native.token_attention import packed_strides, problem


def token_attention_backward(
    grad_out: Tensor,
    grad_importance: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    policy: Tensor | None,
    starts: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    longest: int,
    scale: float,
    importance: str,
    need_bias: bool,
    need_policy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `ops.token_attention`: gradients as `out` lies in memory, and of bias and policy, empty if not needed.

    `grad_out` lies as `out` does: (B, N, H, d), or (T, H, d).
    """
    q, k, v, grad_out = (inner_dense(t) for t in (q, k, v, grad_out))
    if grad_importance is not None:
        grad_importance = grad_importance.contiguous()
    grads = [empty_result(out, out.shape) for _ in range(3)]
    of_heads = [torch.empty_like(row_max) if need else None for need in (need_bias, need_policy)]
    values = problem(q, k, v, bias, policy, starts, longest, importance, row_max, row_sum)
    stride = (
        packed_strides(grad_out)
        if starts is not None
        else (
            grad_out.stride(0),
            grad_out.stride(2),
            grad_out.stride(1),
        )
    )
    kernels(q).token_attention_backward(
        *(values, scale, grad_out.data_ptr(), stride, address(grad_importance)),
        *(g.data_ptr() for g in grads),
        *(address(t) for t in of_heads),
        stream(q),
    )
    # Heads are summed in one order, so the result does not depend on threads.
    sums = [row_max.new_empty(0) if t is None else t.sum(-1) for t in of_heads]
    return grads[0], grads[1], grads[2], sums[0], sums[1]
