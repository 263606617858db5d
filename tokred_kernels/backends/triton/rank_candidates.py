# SPDX-License-Identifier: MIT
"""The best destination of each source in Triton, tile by tile of scores, and the ranks of the sources."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.reference.rank_candidates import MIN_SQUARED_NORM, NO_RANK
from tokred_kernels.backends.triton.common import is_nan, multiply_add, narrow, on_device
from tokred_kernels.backends.triton.configs import MEAN_IN_MATCH_BLOCKS, RANK_CONFIG, match_config, rows_config
from tokred_kernels.partition import Partition

_MIN_SQUARED_NORM = tl.constexpr(MIN_SQUARED_NORM)
_NO_RANK = tl.constexpr(NO_RANK)


def rank_candidates(
    metric: Tensor, partition: Partition, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.rank_candidates`."""
    with on_device(metric):
        score, partner = best_destination(metric, partition, cu_seqlens)
    return score, partner, ranks(score, partition.protected_src, cu_seqlens)


def ranks(score: Tensor, protected: int = 0, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return the rank (B, n) int32 of each score by descending value, ties to the lower index and NaN as -infinity.

    The `protected` first scores of each image have no rank, and with `cu_seqlens` neither have those past its sources.
    """
    images, number = score.shape
    rank = score.new_empty((images, number), dtype=torch.int32)
    blocks = triton.cdiv(number, RANK_CONFIG.block)
    if rank.numel():
        with on_device(score):
            rank_kernel[(images * blocks,)](
                *(score, cu_seqlens, rank, score.stride(0), number, protected, blocks),
                PACKED=cu_seqlens is not None,
                BLOCK=RANK_CONFIG.block,
                CHUNK=RANK_CONFIG.chunk,
                num_warps=RANK_CONFIG.num_warps,
            )
    return rank


def best_destination(metric: Tensor, partition: Partition, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the `score` and `partner` of `ops.rank_candidates`."""
    first, stride, num_src, num_dst, protected_src, protected_dst, _, _, sources, destinations = partition
    metric = inner_dense(metric)
    if cu_seqlens is not None:
        metric = metric.unsqueeze(0)
    if metric.dim() == 3:
        metric = metric.unsqueeze(1)
    _, heads, _, channels = metric.shape
    images = metric.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    score = metric.new_empty((images, num_src), dtype=torch.float32)
    partner = metric.new_empty((images, num_src), dtype=torch.int32)
    if score.numel() == 0:
        return score, partner
    config = match_config(channels, metric.dtype)
    blocks = triton.cdiv(num_src, config.block_src)
    one_chunk = channels <= config.block_channels
    if heads > 1 and not (one_chunk and blocks <= MEAN_IN_MATCH_BLOCKS):
        metric, heads = _mean_over_heads(metric), 1
    match_kernel[(images * blocks,)](
        *(metric, cu_seqlens, sources, destinations, score, partner, *metric.stride()[:3], heads, channels),
        *(first, stride, num_src, num_dst, protected_src, protected_dst, blocks),
        PACKED=cu_seqlens is not None,
        LISTS=sources is not None,
        MEAN=heads > 1,
        ONE_CHUNK=one_chunk,
        BLOCK_SRC=config.block_src,
        BLOCK_DST=config.block_dst,
        BLOCK_CHANNELS=config.block_channels,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return score, partner


def _mean_over_heads(metric: Tensor) -> Tensor:
    """Return (B, 1, N, d), the mean over heads of (B, H, N, d)."""
    images, heads, tokens, channels = metric.shape
    mean = metric.new_empty((images, 1, tokens, channels))
    config = rows_config(channels, metric.dtype)
    grid = (triton.cdiv(images * tokens, config.block_rows), triton.cdiv(channels, config.block_channels))
    mean_kernel[grid](
        *(metric, mean, *metric.stride()[:3], images * tokens, tokens, heads, channels),
        BLOCK_ROWS=config.block_rows,
        BLOCK_CHANNELS=config.block_channels,
        num_warps=config.num_warps,
    )
    return mean


@triton.jit
def source_token(sources, i, mask, first, stride, num_dst, LISTS: tl.constexpr):
    """Return the token of source i; `sources` is the image's list if LISTS."""
    if LISTS:
        token = tl.load(sources + i, mask=mask, other=0)
    else:
        token = first + i + tl.where(stride == 1, num_dst, i // tl.maximum(stride - 1, 1))
    return token


@triton.jit
def destination_token(destinations, j, mask, first, stride, LISTS: tl.constexpr):
    """Return the token of destination j."""
    return tl.load(destinations + j, mask=mask, other=0) if LISTS else first + j * stride + stride - 1


@triton.jit
def packed_rows(cu_seqlens, image):
    """Return the first row of a packed image, and its number of rows."""
    start = tl.load(cu_seqlens + image)
    return start.to(tl.int64), tl.load(cu_seqlens + image + 1) - start


@triton.jit
def load_scores(scores, i, mask):
    """Load scores i of an image; -infinity for NaN and for entries outside `mask`."""
    score = tl.load(scores + i, mask=mask, other=float("-inf"))
    return tl.where(is_nan(score), float("-inf"), score)


@triton.jit
def count_before(scores, i, first, last, CHUNK: tl.constexpr):
    """Return the number of scores in [first, last) that are higher than score i < last, or equal and earlier."""
    mine = load_scores(scores, i, i < last)
    # Each place of the tile counts for itself: a sum over lanes in every round would take most of the time.
    before = tl.zeros((i.shape[0], CHUNK), tl.int32)
    for start in range(first, last, CHUNK):
        k = start + tl.arange(0, CHUNK)
        other = load_scores(scores, k, k < last)[None, :]
        before += ((other > mine[:, None]) | ((other == mine[:, None]) & (k[None, :] < i[:, None]))).to(tl.int32)
    return tl.sum(before, 1)


@triton.jit
def mean_tile(vectors, k, mask, stride_h, heads):
    """The mean over heads of channels k of the vectors at these addresses, in float32, then rounded to their dtype."""
    total = tl.load(vectors[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    for _ in range(1, heads):
        vectors += stride_h
        total += tl.load(vectors[:, None] + k[None, :], mask=mask, other=0.0).to(tl.float32)
    return narrow(tl.div_rn(total, tl.zeros_like(total) + heads), vectors.dtype.element_ty)


@triton.jit
def load_tile(vectors, row_mask, start, stride_h, heads, channels, MEAN: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """(BLOCK, BLOCK_CHANNELS) of the metric, from channel `start` of the vectors at these addresses."""
    k = start + tl.arange(0, BLOCK_CHANNELS)
    mask = row_mask[:, None] & (k < channels)[None, :]
    if MEAN:
        tile = mean_tile(vectors, k, mask, stride_h, heads)
    else:
        tile = tl.load(vectors[:, None] + k[None, :], mask=mask, other=0.0)
    return tile


@triton.jit
def squares(tile):
    """The sum of squares of each row."""
    wide = tile.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def inverse_norm(squared):
    """1 / |v| from |v|^2; 0 for a zero vector."""
    ones = tl.zeros_like(squared) + 1.0
    return tl.where(squared < _MIN_SQUARED_NORM, 0.0, tl.div_rn(ones, tl.sqrt_rn(squared)))


@triton.jit(
    do_not_specialize=["heads", "first", "stride", "num_src", "num_dst", "protected_src", "protected_dst", "blocks"]
)
def match_kernel(
    metric,  # (B, H, N, D), or, if PACKED, (T, D)
    cu_seqlens,  # (B + 1), if PACKED
    sources,  # (B, num_src), or None
    destinations,  # (B, num_dst), or None
    score,  # out: (B, num_src)
    partner,  # out: (B, num_src)
    stride_b,
    stride_h,
    stride_n,
    heads,
    channels,
    first,
    stride,
    num_src,
    num_dst,
    protected_src,
    protected_dst,
    blocks,
    PACKED: tl.constexpr,
    LISTS: tl.constexpr,
    MEAN: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    BLOCK_SRC: tl.constexpr,
    BLOCK_DST: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """A program takes BLOCK_SRC sources of one image past all its destinations."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first_src = tl.program_id(0) % blocks * BLOCK_SRC
    i = first_src + tl.arange(0, BLOCK_SRC)
    is_src = i < num_src
    if PACKED:
        begin, length = packed_rows(cu_seqlens, image)
        metric += begin * stride_n
        is_src = i < (length + 1) // 2
        # A block past the image's last source has nothing to look for.
        num_dst = tl.where(first_src < (length + 1) // 2, length // 2, 0)
    else:
        metric += image * stride_b
    if LISTS:
        sources += image * num_src
        destinations += image * num_dst
    a_at = metric + source_token(sources, i, is_src, first, stride, num_dst, LISTS).to(tl.int64) * stride_n

    # With all channels in one tile the sources are read once, and stay.
    a = load_tile(a_at, is_src, 0, stride_h, heads, channels, MEAN, BLOCK_CHANNELS)
    a_squared = squares(a)
    if not ONE_CHUNK:
        for start in range(BLOCK_CHANNELS, channels, BLOCK_CHANNELS):
            a_squared += squares(load_tile(a_at, is_src, start, stride_h, heads, channels, MEAN, BLOCK_CHANNELS))
    a_inverse = inverse_norm(a_squared)

    # One best for each place in the tile; they meet once, at the end.
    best = tl.full((BLOCK_SRC, BLOCK_DST), float("-inf"), tl.float32)
    best_index = tl.zeros((BLOCK_SRC, BLOCK_DST), tl.int32) + protected_dst
    for start_dst in range(protected_dst, num_dst, BLOCK_DST):
        j = start_dst + tl.arange(0, BLOCK_DST)
        is_dst = j < num_dst
        b_at = metric + destination_token(destinations, j, is_dst, first, stride, LISTS).to(tl.int64) * stride_n
        dots = tl.zeros((BLOCK_SRC, BLOCK_DST), tl.float32)
        if ONE_CHUNK:
            b = load_tile(b_at, is_dst, 0, stride_h, heads, channels, MEAN, BLOCK_CHANNELS)
            b_squared = squares(b)
            dots = multiply_add(a, b, dots)
        else:
            b_squared = tl.zeros((BLOCK_DST,), tl.float32)
            for start in range(0, channels, BLOCK_CHANNELS):
                c = load_tile(a_at, is_src, start, stride_h, heads, channels, MEAN, BLOCK_CHANNELS)
                b = load_tile(b_at, is_dst, start, stride_h, heads, channels, MEAN, BLOCK_CHANNELS)
                b_squared += squares(b)
                dots = multiply_add(c, b, dots)
        # s = (a . b) / |a| / |b|. A comparison with NaN is false, so NaN never becomes the best.
        scores = dots * a_inverse[:, None] * inverse_norm(b_squared)[None, :]
        better = is_dst[None, :] & (scores > best)
        best = tl.where(better, scores, best)
        best_index = tl.where(better, j[None, :], best_index)
    highest = tl.max(best, 1)
    lowest = tl.min(tl.where(best == highest[:, None], best_index, num_dst), 1)
    highest = tl.where(is_src & (i >= protected_src), highest, float("-inf"))
    lowest = tl.where(is_src & (num_dst > protected_dst), lowest, 0)
    tl.store(score + image * num_src + i, highest, mask=i < num_src)
    tl.store(partner + image * num_src + i, lowest, mask=i < num_src)


@triton.jit(do_not_specialize=["stride", "number", "protected", "blocks"])
def rank_kernel(
    score,  # (B, n)
    cu_seqlens,  # (B + 1), if PACKED
    rank,  # out: (B, n)
    stride,
    number,
    protected,
    blocks,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program ranks BLOCK scores of one image by counting those before them: O(n^2), as the match, but cheaper."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_row = i < number
    score += image * stride
    rank += image * number
    if PACKED:
        _, length = packed_rows(cu_seqlens, image)
        number = (length + 1) // 2
    place = count_before(score, i, protected, number, CHUNK)
    tl.store(rank + i, tl.where((i >= protected) & (i < number), place, _NO_RANK), mask=in_row)


@triton.jit(do_not_specialize=["rows", "tokens", "heads"])
def mean_kernel(
    metric,  # (B, H, N, d)
    mean,  # out: (B, N, d), contiguous
    stride_b,
    stride_h,
    stride_n,
    rows,
    tokens,
    heads,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """A tile of the mean over heads."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = (row < rows)[:, None] & (channel < channels)[None, :]
    vectors = metric + (row // tokens).to(tl.int64) * stride_b + (row % tokens).to(tl.int64) * stride_n
    tile = mean_tile(vectors, channel, mask, stride_h, heads)
    tl.store(mean + row.to(tl.int64)[:, None] * channels + channel[None, :], tile, mask=mask)
