# SPDX-License-Identifier: MIT
"""The gradients of lookup attention's scatter, on the CPU and in CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.layout import heads_last
from tokred_kernels.backends.native import empty_result, kernels, stream
from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.native.lookup_gather import lookup_problem, strided


def lookup_scatter_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, only_grad_v: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.lookup_scatter`: the gradients of q, k and v, heads last, and of lse; `grad_out` is (B, N, H, d).

    On the CPU, `only_grad_v` skips the gradients of q and k, which are empty tensors then.
    """
    q, k, v = (inner_dense(t) for t in (q, k, v))
    grad_out, lse = inner_dense(grad_out.transpose(1, 2)), lse.contiguous()
    grads_qk = (t.new_empty(0) if only_grad_v else empty_result(t, heads_last(t)) for t in (q, k))
    grads = (*grads_qk, empty_result(v, heads_last(v)))
    grad_lse = torch.empty_like(lse)
    kernels(q).lookup_scatter_backward(
        *(lookup_problem(q, k), scale, strided(v), strided(grad_out), lse.data_ptr()),
        *(g.data_ptr() for g in grads),
        *(grad_lse.data_ptr(), stream(q)),
    )
    return grads[0], grads[1], grads[2], grad_lse
