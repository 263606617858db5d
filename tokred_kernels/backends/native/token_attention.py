# SPDX-License-Identifier: MIT
"""Token attention, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.layout import attention_layout
from tokred_kernels.backends.native import DTYPE_CODE, address, empty_result, kernels, stream
from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.dtypes import accumulator_of

IMPORTANCE_CODE = {"": 0, "class": 1, "mean": 2, "last": 3}


def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    policy: Tensor | None,
    starts: Tensor | None,
    longest: int,
    scale: float,
    importance: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.token_attention`: out (heads last), the row maxima and sums for the backward, and the importance."""
    q, k, v = (inner_dense(t) for t in (q, k, v))
    layout = attention_layout(q, starts)
    accumulator = accumulator_of(q)
    out = empty_result(q, layout)
    row_max, row_sum = (q.new_empty(layout[:-1], dtype=accumulator) for _ in range(2))
    importance_out = q.new_empty(layout[:-2] if importance else (0,), dtype=accumulator)
    partial = torch.empty_like(row_max) if importance else None
    values = problem(q, k, v, bias, policy, starts, longest, importance, row_max, row_sum)
    outputs = out.data_ptr(), address(partial), importance_out.data_ptr() if importance else 0
    kernels(q).token_attention(values, scale, *outputs, stream(q))
    return out, row_max, row_sum, importance_out


def problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    policy: Tensor | None,
    starts: Tensor | None,
    longest: int,
    importance: str,
    row_max: Tensor,
    row_sum: Tensor,
) -> tuple[int, ...]:
    """Return the numbers of a TokenAttentionProblem; see csrc/common/args.h and csrc/bindings_attention.cpp."""
    if starts is None:
        sizes = tuple(q.shape)
        strides = [t.stride()[:3] for t in (q, k, v)]
    else:
        sizes = (starts.shape[0] - 1, q.shape[1], longest, q.shape[2])
        strides = [packed_strides(t) for t in (q, k, v)]
    addresses = (address(bias), address(policy), address(starts))
    rows = row_max.data_ptr(), row_sum.data_ptr()
    inputs = (q.data_ptr(), k.data_ptr(), v.data_ptr())
    flat = (number for stride in strides for number in stride)
    return (*inputs, *flat, *sizes, DTYPE_CODE[q.dtype], *addresses, IMPORTANCE_CODE[importance], *rows)


def packed_strides(tensor: Tensor) -> tuple[int, int, int]:
    """Return the strides of image, head and token of packed rows (T, H, d); 0 for images: rows are absolute."""
    return 0, tensor.stride(1), tensor.stride(0)
