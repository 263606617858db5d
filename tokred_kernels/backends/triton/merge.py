# SPDX-License-Identifier: MIT
"""Merge in Triton: a segment reduce, each output row owned by one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.native import rows
from tokred_kernels.backends.triton.common import is_nan, narrow, on_device
from tokred_kernels.backends.triton.configs import rows_config


def merge(
    x: Tensor,
    weight: Tensor | None,
    members: Tensor,
    begin: Tensor,
    count: Tensor,
    reduce: str,
    weight_sum: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.merge`: y (B, N', C), and sums of weights (B, N'), empty unless `weight_sum`."""
    x = rows(x)
    batch, num_out = begin.shape
    channels = x.shape[2]
    y = x.new_empty((batch, num_out, channels))
    sums = x.new_empty((batch, num_out) if weight_sum else (0,), dtype=torch.float32)
    if batch * num_out:
        config = rows_config(channels, x.dtype)
        # At least one column of programs, even without channels: they also write the sums.
        columns = max(1, triton.cdiv(channels, config.block_channels))
        with on_device(x):
            merge_kernel[(triton.cdiv(batch * num_out, config.block_rows), columns)](
                *(x, weight, members, begin, count, y, sums, x.stride(1), batch * num_out, channels),
                REDUCE=reduce,
                WEIGHTED=weight is not None,
                SUMS=weight_sum,
                BLOCK_ROWS=config.block_rows,
                BLOCK_CHANNELS=config.block_channels,
                UNROLL=config.unroll,
                num_warps=config.num_warps,
            )
    return y, sums


@triton.jit(do_not_specialize=["num_rows"])
def merge_kernel(
    x,  # (rows, C)
    weight,  # (rows), or None
    members,  # (rows)
    begin,  # (num_rows)
    count,  # (num_rows)
    y,  # out: (num_rows, C), contiguous
    sums,  # out: (num_rows), if SUMS
    x_stride,
    num_rows,
    channels,
    REDUCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A tile of output rows: member after member, ascending, so that a sum has one order."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_row, is_channel = row < num_rows, channel < channels
    first = tl.load(begin + row, mask=is_row, other=0)
    size = tl.load(count + row, mask=is_row, other=0)

    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    start = float("-inf") if REDUCE == "amax" else 0.0
    reduced = tl.full((BLOCK_ROWS, BLOCK_CHANNELS), start, tl.float32)
    for m in range(0, tl.max(size, 0), UNROLL):
        for step in tl.static_range(UNROLL):
            present = m + step < size
            member = tl.load(members + first + m + step, mask=present, other=0).to(tl.int64)
            at = x + member[:, None] * x_stride + channel[None, :]
            mask = present[:, None] & is_channel[None, :]
            if REDUCE == "amax":
                value = tl.load(at, mask=mask, other=float("-inf")).to(tl.float32)
                # A NaN replaces what is there, and nothing replaces a NaN.
                reduced = tl.where((value > reduced) | is_nan(value), value, reduced)
            else:
                value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                if WEIGHTED:
                    w = tl.load(weight + member, mask=present, other=0.0)
                    total += w
                    value *= w[:, None]
                reduced += value

    if not WEIGHTED:
        total = size.to(tl.float32)
    if REDUCE == "mean":
        # The mean is 0 if the weights sum to 0, as in a slot without members.
        is_zero = total == 0
        reduced = tl.div_rn(reduced, tl.broadcast_to(tl.where(is_zero, 1.0, total)[:, None], reduced.shape))
        reduced = tl.where(is_zero[:, None], 0.0, reduced)
    if REDUCE == "amax":
        reduced = tl.where((size > 0)[:, None], reduced, 0.0)
    at = y + row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(at, narrow(reduced, y.dtype.element_ty), mask=is_row[:, None] & is_channel[None, :])
    if SUMS:
        tl.store(sums + row, total, mask=is_row & (tl.program_id(1) == 0))
