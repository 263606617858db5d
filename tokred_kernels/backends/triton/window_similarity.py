# SPDX-License-Identifier: MIT
"""The mean pairwise cosine of each window in Triton: unit vectors summed token by token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.triton.common import is_nan, on_device
from tokred_kernels.backends.triton.configs import window_config
from tokred_kernels.backends.triton.rank_candidates import inverse_norm, squares
from tokred_kernels.windows import Windows


def window_similarity(x: Tensor, windows: Windows, threshold: float) -> tuple[Tensor, Tensor]:
    """See `ops.window_similarity`."""
    x = inner_dense(x)
    images, _, channels = x.shape
    score = x.new_empty((images, windows.number()), dtype=torch.float32)
    if score.numel():
        config = window_config(channels)
        one_chunk = channels <= config.block_channels
        inverse = None if one_chunk else x.new_empty(score.numel() * windows.size(), dtype=torch.float32)
        with on_device(x):
            window_kernel[(triton.cdiv(score.numel(), config.block_windows),)](
                *(x, inverse, score, *x.stride()[:2], images * windows.number(), channels),
                *(windows.first, windows.grid_width, windows.height, windows.width, windows.down(), windows.across()),
                ONE_CHUNK=one_chunk,
                BLOCK_WINDOWS=config.block_windows,
                BLOCK_CHANNELS=config.block_channels,
                UNROLL=config.unroll,
                num_warps=config.num_warps,
            )
    return score, (score >= threshold).sum(1, dtype=torch.int32)


@triton.jit(do_not_specialize=["num_windows", "first", "grid_width", "height", "width", "down", "across"])
def window_kernel(
    x,  # (B, N, C)
    inverse,  # workspace (num_windows * height * width), unless ONE_CHUNK
    score,  # out: (num_windows)
    stride_b,
    stride_n,
    num_windows,
    channels,
    first,
    grid_width,
    height,
    width,
    down,
    across,
    ONE_CHUNK: tl.constexpr,
    BLOCK_WINDOWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A program takes BLOCK_WINDOWS windows of any images; the equation is in csrc/common/args.h."""
    window = tl.program_id(0) * BLOCK_WINDOWS + tl.arange(0, BLOCK_WINDOWS)
    is_window = window < num_windows
    image, place = window // (down * across), window % (down * across)
    corner = first + place // across * height * grid_width + place % across * width
    corners = x + image.to(tl.int64) * stride_b + corner.to(tl.int64) * stride_n
    size = height * width

    if not ONE_CHUNK:
        for t in range(size):
            squared = tl.zeros((BLOCK_WINDOWS,), tl.float32)
            for start in range(0, channels, BLOCK_CHANNELS):
                at = corners + (t // width * grid_width + t % width).to(tl.int64) * stride_n
                squared += squares(load_rows(at, is_window, start, channels, BLOCK_CHANNELS))
            tl.store(inverse + window * size + t, inverse_norm(squared), mask=is_window)
        tl.debug_barrier()  # each thread sees the norms

    # |sum u|^2 - sum |u|^2
    pairs = tl.zeros((BLOCK_WINDOWS,), tl.float32)
    for start in range(0, channels, BLOCK_CHANNELS):
        total = tl.zeros((BLOCK_WINDOWS, BLOCK_CHANNELS), tl.float32)
        own = tl.zeros((BLOCK_WINDOWS,), tl.float32)
        for some in range(0, size, UNROLL):
            for step in tl.static_range(UNROLL):
                t = some + step
                present = is_window & (t < size)
                at = corners + (t // width * grid_width + t % width).to(tl.int64) * stride_n
                unit = load_rows(at, present, start, channels, BLOCK_CHANNELS)
                if ONE_CHUNK:
                    scale = inverse_norm(squares(unit))
                else:
                    scale = tl.load(inverse + window * size + t, mask=present, other=0.0)
                unit *= scale[:, None]
                total += unit
                own += squares(unit)
        pairs += tl.sum(total * total, 1) - own
    number = size.to(tl.float32) * (size - 1).to(tl.float32)
    mean = tl.div_rn(pairs, tl.zeros_like(pairs) + number)
    tl.store(score + window, tl.where(is_nan(mean), float("-inf"), mean), mask=is_window)


@triton.jit
def load_rows(at, mask, start, channels, BLOCK_CHANNELS: tl.constexpr):
    """(BLOCK, BLOCK_CHANNELS) of the vectors at these addresses, from channel `start`, in float32."""
    k = start + tl.arange(0, BLOCK_CHANNELS)
    mask = mask[:, None] & (k < channels)[None, :]
    return tl.load(at[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
