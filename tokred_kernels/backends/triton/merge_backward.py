# SPDX-License-Identifier: MIT
"""The gradients of merge in Triton: a gather along `dest`; for amax, a second walk over the members of each slot."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.native import rows
from tokred_kernels.backends.triton.common import is_nan, narrow, on_device
from tokred_kernels.backends.triton.configs import rows_config


def merge_backward(
    grad_y: Tensor,
    grad_weight_sum: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    weight_sum: Tensor | None,
    dest: Tensor,
    members: Tensor,
    begin: Tensor,
    count: Tensor,
    reduce: str,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.merge`: the gradients of x (B, N, C) and weight (B, N), each empty if it is not needed."""
    grad_y = grad_y.contiguous()
    if grad_weight_sum is not None:
        grad_weight_sum = grad_weight_sum.contiguous()
    if x is not None:
        x = rows(x)
    (batch, tokens), (_, num_out, channels) = dest.shape, grad_y.shape
    grad_weight = grad_y.new_empty((batch, tokens) if need_weight else (0,), dtype=torch.float32)
    config = rows_config(channels, grad_y.dtype)
    columns = max(1, triton.cdiv(channels, config.block_channels))
    x_stride = 0 if x is None else x.stride(1)
    if reduce == "amax":
        # The members of a slot have their gradients from its program; dropped tokens are in no slot.
        grad_x = grad_y.new_zeros((batch, tokens, channels) if need_x else (0,))
        if need_x and batch * num_out:
            with on_device(grad_y):
                amax_backward_kernel[(triton.cdiv(batch * num_out, config.block_rows), columns)](
                    *(grad_y, x, y, members, begin, count, grad_x, x_stride, batch * num_out, channels),
                    BLOCK_ROWS=config.block_rows,
                    BLOCK_CHANNELS=config.block_channels,
                    num_warps=config.num_warps,
                )
        return grad_x, grad_weight

    grad_x = grad_y.new_empty((batch, tokens, channels) if need_x else (0,))
    if batch * tokens and (need_x or need_weight):
        with on_device(grad_y):
            # A weight's gradient is a dot product over all channels: then one program takes whole rows.
            merge_backward_kernel[(triton.cdiv(batch * tokens, config.block_rows), 1 if need_weight else columns)](
                *(grad_y, grad_weight_sum, x, y, weight, weight_sum, dest.contiguous(), count, grad_x, grad_weight),
                *(x_stride, batch * tokens, tokens, num_out, channels),
                MEAN=reduce == "mean",
                WEIGHTED=weight is not None,
                SUMS=grad_weight_sum is not None,
                NEED_X=need_x,
                NEED_WEIGHT=need_weight,
                BLOCK_ROWS=config.block_rows,
                BLOCK_CHANNELS=config.block_channels,
                num_warps=config.num_warps,
            )
    return grad_x, grad_weight


@triton.jit(do_not_specialize=["num_rows", "tokens", "num_out"])
def merge_backward_kernel(
    grad_y,  # (B * N', C), contiguous
    grad_weight_sum,  # (B * N'), or None
    x,  # (B * N, C), if NEED_WEIGHT
    y,  # (B * N', C), contiguous, if NEED_WEIGHT and MEAN
    weight,  # (B * N), or None
    weight_sum,  # (B * N'), if WEIGHTED and MEAN
    dest,  # (B * N)
    count,  # (B * N')
    grad_x,  # out: (B * N, C), contiguous, if NEED_X
    grad_weight,  # out: (B * N), if NEED_WEIGHT
    x_stride,
    num_rows,
    tokens,
    num_out,
    channels,
    MEAN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUMS: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """A tile of tokens; the equations are in csrc/common/args.h."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_rows
    slot = tl.load(dest + row, mask=is_row, other=-1)
    kept = slot >= 0
    counted = kept
    source = (row // tokens).to(tl.int64) * num_out + slot
    factor = tl.where(kept, 1.0, 0.0)
    if WEIGHTED:
        factor = tl.load(weight + row, mask=kept, other=0.0)
    if MEAN:
        if WEIGHTED:
            total = tl.load(weight_sum + source, mask=kept, other=1.0)
        else:
            total = tl.load(count + source, mask=kept, other=1).to(tl.float32)
        counted = kept & (total != 0)  # else the mean is 0, whatever the slot's members hold
        total = tl.where(counted, total, 1.0)
        factor = tl.div_rn(factor, total)

    dots = tl.zeros((BLOCK_ROWS,), tl.float32)
    row = row.to(tl.int64)
    stride = tl.num_programs(1) * BLOCK_CHANNELS
    for start in range(tl.program_id(1) * BLOCK_CHANNELS, channels, stride):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        is_channel = channel < channels
        mask = counted[:, None] & is_channel[None, :]
        in_slots = source[:, None] * channels + channel[None, :]
        g = tl.load(grad_y + in_slots, mask=mask, other=0.0).to(tl.float32)
        if NEED_X:
            # Dropped rows are 0 by their load, whatever their factor.
            at = grad_x + row[:, None] * channels + channel[None, :]
            value = narrow(g * factor[:, None], grad_x.dtype.element_ty)
            tl.store(at, value, mask=is_row[:, None] & is_channel[None, :])
        if NEED_WEIGHT:
            away = tl.load(x + row[:, None] * x_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
            if MEAN:  # subtracted first: of the two products, little may be left
                away -= tl.load(y + in_slots, mask=mask, other=0.0).to(tl.float32)
            dots += tl.sum(away * g, 1)
    if NEED_WEIGHT:
        if MEAN:
            dots = tl.div_rn(dots, total)
        if SUMS:
            dots += tl.load(grad_weight_sum + source, mask=kept, other=0.0)
        tl.store(grad_weight + row, dots, mask=is_row)


@triton.jit(do_not_specialize=["num_rows"])
def amax_backward_kernel(
    grad_y,  # (num_rows, C), contiguous
    x,  # (rows, C)
    y,  # (num_rows, C), contiguous
    members,  # (rows)
    begin,  # (num_rows)
    count,  # (num_rows)
    grad_x,  # out: (rows, C), contiguous
    x_stride,
    num_rows,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """A tile of slots: the members that reach its maximum are counted, then share its gradient."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_row, is_channel = row < num_rows, channel < channels
    mask = is_row[:, None] & is_channel[None, :]
    in_slots = row.to(tl.int64)[:, None] * channels + channel[None, :]
    first = tl.load(begin + row, mask=is_row, other=0)
    size = tl.load(count + row, mask=is_row, other=0)
    highest = tl.load(y + in_slots, mask=mask, other=0.0).to(tl.float32)
    longest = tl.max(size, 0)

    ties = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for m in range(longest):
        present = m < size
        member = tl.load(members + first + m, mask=present, other=0).to(tl.int64)
        mask = present[:, None] & is_channel[None, :]
        value = tl.load(x + member[:, None] * x_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        ties += (mask & reaches(value, highest)).to(tl.float32)

    mask = is_row[:, None] & is_channel[None, :]
    share = tl.load(grad_y + in_slots, mask=mask, other=0.0).to(tl.float32)
    share = narrow(tl.div_rn(share, tl.maximum(ties, 1.0)), grad_x.dtype.element_ty)
    for m in range(longest):
        present = m < size
        member = tl.load(members + first + m, mask=present, other=0).to(tl.int64)
        mask = present[:, None] & is_channel[None, :]
        value = tl.load(x + member[:, None] * x_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        at = grad_x + member[:, None] * channels + channel[None, :]
        tl.store(at, tl.where(reaches(value, highest), share, 0.0), mask=mask)


@triton.jit
def reaches(value, highest):
    """Return whether a value equals the maximum; NaN equals NaN."""
    return (value == highest) | (is_nan(value) & is_nan(highest))
