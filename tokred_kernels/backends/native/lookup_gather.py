# SPDX-License-Identifier: MIT
"""Lookup attention's gather, on the CPU and in CUDA."""

from __future__ import annotations

from torch import Tensor

from tokred_kernels.backends.layout import heads_last
from tokred_kernels.backends.native import DTYPE_CODE, empty_result, kernels, stream
from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.dtypes import accumulator_of


def lookup_gather(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `ops.lookup_gather`: out (B, M, H, d) and lse (B, H, M)."""
    q, k, v = (inner_dense(t) for t in (q, k, v))
    out = empty_result(q, heads_last(q))
    lse = q.new_empty(q.shape[:3], dtype=accumulator_of(q))
    problem = lookup_problem(q, k)
    kernels(q).lookup_gather(problem, scale, strided(v), out.data_ptr(), lse.data_ptr(), stream(q))
    return out, lse


def lookup_problem(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """Return the numbers of a LookupProblem; see csrc/common/args.h and csrc/bindings_attention.cpp."""
    sizes = (*q.shape[:3], k.shape[2], q.shape[3])
    return (*strided(q), *strided(k), *sizes, DTYPE_CODE[q.dtype])


def strided(tensor: Tensor) -> tuple[int, int, int, int]:
    """Return the address, and the strides of image, head and token."""
    image, head, token, _ = tensor.stride()
    return tensor.data_ptr(), image, head, token
