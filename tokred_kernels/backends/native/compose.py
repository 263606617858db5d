# SPDX-License-Identifier: MIT
"""Composition of two maps, on the CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.native import check_indices, kernels, stream


def compose(first: Tensor, second: Tensor) -> Tensor:
    """See `token_map_ops.compose`."""
    if not (first.dtype is second.dtype is torch.int32 and first.is_contiguous() and second.is_contiguous()):
        check_indices("compose", first, first, second)  # called for its message only: it runs between two layers
    (batch, tokens), (images, middle) = first.shape, second.shape
    if images != batch:
        raise ValueError(f"tokred_kernels.compose: second must have the batch of first, got {images} and {batch}")
    dest = torch.empty_like(first)
    kernels(first).compose(first.data_ptr(), second.data_ptr(), batch, tokens, middle, dest.data_ptr(), stream(first))
    return dest
