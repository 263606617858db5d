# SPDX-License-Identifier: MIT
"""Unmerge, on the CPU and on CUDA."""

from __future__ import annotations

from torch import Tensor

from tokred_kernels.backends.native import DTYPE_CODE, kernels, room, rows, stream


def unmerge(y: Tensor, dest: Tensor) -> Tensor:
    """See `ops.unmerge`."""
    y = rows(y)
    (batch, num_out, channels), tokens = y.shape, dest.shape[1]
    x = room(y, (batch, tokens, channels))
    kernels(y).unmerge(
        *(y.data_ptr(), y.stride(1), dest.data_ptr(), x.data_ptr()),
        *(batch, tokens, num_out, channels, DTYPE_CODE[y.dtype], stream(y)),
    )
    return x
