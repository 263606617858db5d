# SPDX-License-Identifier: MIT
"""Unmerge, on the CPU and on CUDA."""

from __future__ import annotations

from torch import Tensor

from tokred_kernels.backends.native import DTYPE_CODE, check_indices, empty_result, kernels, rows, stream


def unmerge(y: Tensor, dest: Tensor) -> Tensor:
    """See `ops.unmerge`."""
    y = rows(y)
    check_indices("unmerge", y, dest)
    (batch, num_out, channels), (images, tokens) = y.shape, dest.shape
    if images != batch:
        raise ValueError(f"tokred_kernels.unmerge: dest must have the batch of y, got {dest.shape} and {y.shape}")
    x = empty_result(y, (batch, tokens, channels))
    kernels(y).unmerge(
        *(y.data_ptr(), y.stride(1), dest.data_ptr(), x.data_ptr()),
        *(batch, tokens, num_out, channels, DTYPE_CODE[y.dtype], stream(y)),
    )
    return x
