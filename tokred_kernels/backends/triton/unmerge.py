# SPDX-License-Identifier: MIT
"""Unmerge in Triton: a gather of rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.native import rows
from tokred_kernels.backends.triton.common import on_device
from tokred_kernels.backends.triton.configs import rows_config


def unmerge(y: Tensor, dest: Tensor) -> Tensor:
    """See `ops.unmerge`."""
    y = rows(y)
    (batch, num_out, channels), tokens = y.shape, dest.shape[1]
    x = y.new_empty((batch, tokens, channels))
    if x.numel():
        config = rows_config(channels, y.dtype)
        grid = (triton.cdiv(batch * tokens, config.block_rows), triton.cdiv(channels, config.block_channels))
        with on_device(y):
            unmerge_kernel[grid](
                *(y, dest.contiguous(), x, y.stride(1), batch * tokens, tokens, num_out, channels),
                BLOCK_ROWS=config.block_rows,
                BLOCK_CHANNELS=config.block_channels,
                num_warps=config.num_warps,
            )
    return x


@triton.jit(do_not_specialize=["num_rows", "tokens", "num_out"])
def unmerge_kernel(
    y,  # (B * N', C)
    dest,  # (B * N)
    x,  # out: (B * N, C), contiguous
    y_stride,
    num_rows,
    tokens,
    num_out,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Copy a tile of tokens from their slots; 0 for dropped tokens."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_row, is_channel = row < num_rows, channel < channels
    slot = tl.load(dest + row, mask=is_row, other=-1)
    source = (row // tokens).to(tl.int64) * num_out + slot
    at = y + source[:, None] * y_stride + channel[None, :]
    value = tl.load(at, mask=(slot >= 0)[:, None] & is_channel[None, :], other=0.0)
    at = x + row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(at, value, mask=is_row[:, None] & is_channel[None, :])
