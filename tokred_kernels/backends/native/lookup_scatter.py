# SPDX-License-Identifier: MIT
"""Lookup attention's scatter, on the CPU and in CUDA."""

from __future__ import annotations

from torch import Tensor

from tokred_kernels.backends.layout import heads_last
from tokred_kernels.backends.native import empty_result, kernels, stream
from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.native.lookup_gather import lookup_problem, strided


def lookup_scatter(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float) -> Tensor:
    """See `ops.lookup_scatter`: (B, N, H, d)."""
    q, k, v = (inner_dense(t) for t in (q, k, v))
    lse = lse.contiguous()
    out = empty_result(k, heads_last(k))
    kernels(q).lookup_scatter(lookup_problem(q, k), scale, strided(v), lse.data_ptr(), out.data_ptr(), stream(q))
    return out
