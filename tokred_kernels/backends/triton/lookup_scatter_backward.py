# SPDX-License-Identifier: MIT
"""The gradients of lookup attention's scatter in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.triton.common import on_device
from tokred_kernels.backends.triton.lookup_gradients import differentiate_keys, differentiate_queries
from tokred_kernels.backends.triton.lookup_tiles import empty_heads_last


def lookup_scatter_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.lookup_scatter`: gradients as results lie, heads last, and of lse; `grad_out` comes as (B, N, H, d)."""
    q, k, v = (inner_dense(t) for t in (q, k, v))
    grad_out, lse = inner_dense(grad_out.transpose(1, 2)), lse.contiguous()
    grad_q, grad_k, grad_v = (empty_heads_last(t) for t in (q, k, v))
    grad_lse = torch.empty_like(lse)
    with on_device(q):
        differentiate_queries(q, k, v, grad_out, lse, scale, [grad_q, grad_v, grad_lse])
        differentiate_keys(q, k, v, grad_out, lse, scale, grad_k)
    return grad_q, grad_k, grad_v, grad_lse
