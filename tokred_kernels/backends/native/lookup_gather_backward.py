# SPDX-License-Identifier: MIT
"""The gradients of lookup attention's gather, on the CPU and in CUDA."""

from __future__ import annotations

from torch import Tensor

from tokred_kernels.backends.layout import heads_last
from tokred_kernels.backends.native import address, empty_result, kernels, stream
from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.native.lookup_gather import lookup_problem, strided


def lookup_gather_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    scattered: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.lookup_gather`: the gradients of q, k and v, heads last; `grad_out` and `out` are (B, M, H, d).

    On the CPU, `scattered` can hold the v (B, H, M, d) of a scatter with the same weights and the gradient of its
    result (B, H, N, d); the gradients of q and k then include those of the scatter.
    """
    q, k, v = (inner_dense(t) for t in (q, k, v))
    grad_out = inner_dense(grad_out.transpose(1, 2))
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    grads = empty_result(q, heads_last(q)), empty_result(k, heads_last(k)), empty_result(v, heads_last(v))
    dense = (None, None) if scattered is None else tuple(inner_dense(t) for t in scattered)
    kernels(q).lookup_gather_backward(
        *(lookup_problem(q, k), scale, strided(v), strided(grad_out)),
        *(address(grad_lse), out.data_ptr(), lse.data_ptr()),
        *(g.data_ptr() for g in grads),
        *(None if t is None else strided(t) for t in dense),
        stream(q),
    )
    return grads
