# SPDX-License-Identifier: MIT
"""The gradients of lookup attention's gather in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.triton.common import on_device
from tokred_kernels.backends.triton.lookup_gradients import differentiate_keys, differentiate_queries
from tokred_kernels.backends.triton.lookup_tiles import empty_heads_last


def lookup_gather_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.lookup_gather`: gradients as results lie, heads last; `grad_out` and `out` come as (B, M, H, d)."""
    q, k, v = (inner_dense(t) for t in (q, k, v))
    grad_out = inner_dense(grad_out.transpose(1, 2))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grad_q, grad_k, grad_v = (empty_heads_last(t) for t in (q, k, v))
    offset = torch.empty_like(lse)
    with on_device(q):
        differentiate_queries(q, k, grad_out, v, lse, scale, [grad_q], of_gather=(out, grad_lse, offset))
        differentiate_keys(q, k, grad_out, v, lse, scale, grad_k, of_gather=(offset, grad_v))
    return grad_q, grad_k, grad_v
