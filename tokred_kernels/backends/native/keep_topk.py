# SPDX-License-Identifier: MIT
"""Keeping the highest scores, on the CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.native import kernels, stream
from tokred_kernels.backends.native.bipartite_match import inner_dense


def keep_topk(scores: Tensor, k: int, first: int, fuse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.keep_topk`: dest, members, begin, count."""
    scores = inner_dense(scores)
    images, tokens = scores.shape
    dest = scores.new_empty(images, tokens, dtype=torch.int32)
    members = dest.new_empty(images * tokens)
    begin, count = (dest.new_empty(images, first + k + int(fuse)) for _ in range(2))
    kernels(scores).keep_topk(
        *(scores.data_ptr(), scores.stride(0), images, tokens, first, k, int(fuse)),
        *(dest.data_ptr(), members.data_ptr(), begin.data_ptr(), count.data_ptr(), stream(scores)),
    )
    return dest, members, begin, count
