# SPDX-License-Identifier: MIT
"""Match in Triton: scores tile by tile with the running best in registers, then the map of an image in one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.reference.bipartite_match import MIN_SQUARED_NORM, build_dest
from tokred_kernels.backends.reference.invert import invert
from tokred_kernels.backends.triton import multiply_add, narrow, on_device
from tokred_kernels.backends.triton.configs import MEAN_IN_MATCH_BLOCKS, match_config, rows_config, select_config
from tokred_kernels.partition import Partition

_MIN_SQUARED_NORM = tl.constexpr(MIN_SQUARED_NORM)


def bipartite_match(metric: Tensor, partition: Partition) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `backends.reference.bipartite_match`; this also writes the second view: dest, members, begin, count."""
    if metric.stride(-1) != 1 and metric.shape[-1] != 1:
        metric = metric.contiguous()
    if metric.dim() == 3:
        metric = metric.unsqueeze(1)
    first, _, num_src, num_dst, protected_src, protected_dst, by_index, r, sources, destinations = partition
    images, _, tokens, _ = metric.shape
    num_out = first + num_src - r + num_dst
    with on_device(metric):
        score, index = _best_destination(metric, partition)
        config = select_config(num_src, num_dst)
        if config is None:
            dest = build_dest(score, index.long(), tokens, partition)
            return dest, *invert(dest, num_out)
        dest = metric.new_empty((images, tokens), dtype=torch.int32)
        members = metric.new_empty(images * tokens, dtype=torch.int32)
        begin = metric.new_empty((images, num_out), dtype=torch.int32)
        count = metric.new_empty((images, num_out), dtype=torch.int32)
        if images:
            select_kernel[(images,)](
                *(score, index, sources, destinations, dest, members, begin, count),
                *(tokens, first, partition.stride, num_src, num_dst, protected_src, protected_dst, r),
                LISTS=sources is not None,
                BY_INDEX=by_index,
                BLOCK=config.block,
                CHUNK=config.chunk,
                num_warps=config.num_warps,
            )
    return dest, members, begin, count


def _best_destination(metric: Tensor, partition: Partition) -> tuple[Tensor, Tensor]:
    """The best score of each source, float32, and whose it is, int32: (B, num_src) each. The metric is (B, H, N, D)."""
    first, stride, num_src, num_dst, _, protected_dst, _, _, sources, destinations = partition
    images, heads, _, channels = metric.shape
    score = metric.new_empty((images, num_src), dtype=torch.float32)
    index = metric.new_empty((images, num_src), dtype=torch.int32)
    if score.numel() == 0:
        return score, index
    config = match_config(channels, metric.dtype)
    blocks = triton.cdiv(num_src, config.block_src)
    one_chunk = channels <= config.block_channels
    if heads > 1 and not (one_chunk and blocks <= MEAN_IN_MATCH_BLOCKS):
        metric, heads = _mean_over_heads(metric), 1
    match_kernel[(images * blocks,)](
        *(metric, sources, destinations, score, index, *metric.stride()[:3], heads, channels),
        *(first, stride, num_src, num_dst, protected_dst, blocks),
        LISTS=sources is not None,
        MEAN=heads > 1,
        ONE_CHUNK=one_chunk,
        BLOCK_SRC=config.block_src,
        BLOCK_DST=config.block_dst,
        BLOCK_CHANNELS=config.block_channels,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return score, index


def _mean_over_heads(metric: Tensor) -> Tensor:
    """(B, 1, N, d) from (B, H, N, d)."""
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
def source_token(sources, i, mask, first, stride, LISTS: tl.constexpr):
    """The token that is source i; `sources` is the image's list, if it has one."""
    return tl.load(sources + i, mask=mask, other=0) if LISTS else first + i + i // tl.maximum(stride - 1, 1)


@triton.jit
def destination_token(destinations, j, mask, first, stride, LISTS: tl.constexpr):
    """The token that is destination j."""
    return tl.load(destinations + j, mask=mask, other=0) if LISTS else first + j * stride + stride - 1


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


@triton.jit(do_not_specialize=["heads", "channels", "first", "stride", "num_src", "num_dst", "protected_dst", "blocks"])
def match_kernel(
    metric,  # (B, H, N, D)
    sources,  # (B, num_src), or None
    destinations,  # (B, num_dst), or None
    score,  # out: (B, num_src)
    index,  # out: (B, num_src)
    stride_b,
    stride_h,
    stride_n,
    heads,
    channels,
    first,
    stride,
    num_src,
    num_dst,
    protected_dst,
    blocks,
    LISTS: tl.constexpr,
    MEAN: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    BLOCK_SRC: tl.constexpr,
    BLOCK_DST: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """A program takes BLOCK_SRC sources of one image past all its destinations."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK_SRC + tl.arange(0, BLOCK_SRC)
    is_src = i < num_src
    metric += image * stride_b
    if LISTS:
        sources += image * num_src
        destinations += image * num_dst
    a_at = metric + source_token(sources, i, is_src, first, stride, LISTS).to(tl.int64) * stride_n

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
        # s = (a . b) / |a| / |b|. A NaN is no greater than anything, so it never becomes the best.
        scores = dots * a_inverse[:, None] * inverse_norm(b_squared)[None, :]
        better = is_dst[None, :] & (scores > best)
        best = tl.where(better, scores, best)
        best_index = tl.where(better, j[None, :], best_index)
    highest = tl.max(best, 1)
    lowest = tl.min(tl.where(best == highest[:, None], best_index, num_dst), 1)
    tl.store(score + image * num_src + i, highest, mask=is_src)
    tl.store(index + image * num_src + i, lowest, mask=is_src)


@triton.jit(do_not_specialize=["rows", "tokens", "heads", "channels"])
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


@triton.jit(
    do_not_specialize=["tokens", "first", "stride", "num_src", "num_dst", "protected_src", "protected_dst", "r"]
)
def select_kernel(
    score,  # (B, num_src)
    index,  # (B, num_src); overwritten: -1 where the source does not join
    sources,  # (B, num_src), or None
    destinations,  # (B, num_dst), or None
    dest,  # out: (B, N)
    members,  # out: (B * N)
    begin,  # out: (B, N')
    count,  # out: (B, N')
    tokens,
    first,
    stride,
    num_src,
    num_dst,
    protected_src,
    protected_dst,
    r,
    LISTS: tl.constexpr,
    BY_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program writes both views of one image's map; see csrc/common/args.h for the slots.

    Ranks, counts and places are all found by counting, so nothing is sorted and no order depends on timing.
    """
    image = tl.program_id(0).to(tl.int64)
    num_unmerged = num_src - r
    num_out = first + num_unmerged + num_dst
    row = (image * tokens).to(tl.int32)
    score += image * num_src
    index += image * num_src
    dest += image * tokens
    members += image * tokens
    begin += image * num_out
    count += image * num_out
    if LISTS:
        sources += image * num_src
        destinations += image * num_dst

    # Tokens that are in neither list, or in the tail of an arithmetic partition, are dropped.
    kept = first + num_src + num_dst
    lanes = tl.arange(0, BLOCK)
    if kept < tokens:
        for start in range(first, tokens, BLOCK):
            tl.store(dest + start + lanes, -1, mask=start + lanes < tokens)
        for start in range(kept, tokens, BLOCK):
            tl.store(members + start + lanes, -1, mask=start + lanes < tokens)
    for start in range(0, first, BLOCK):
        token = start + lanes
        tl.store(dest + token, token, mask=token < first)
        tl.store(members + token, row + token, mask=token < first)
        tl.store(begin + token, row + token, mask=token < first)
        tl.store(count + token, 1, mask=token < first)

    # A source's rank is the number of candidates that beat it. Where all join, no rank is needed: 0 will do.
    i = lanes
    is_src = i < num_src
    mine = tl.load(score + i, mask=is_src, other=0.0)
    rank = tl.zeros((BLOCK,), tl.int32)
    last = tl.where(r < num_src - protected_src, num_src, 0)
    for start in range(protected_src, last, CHUNK):
        k = start + tl.arange(0, CHUNK)
        other = tl.load(score + k, mask=k < num_src, other=0.0)
        beats = (other[None, :] > mine[:, None]) | ((other[None, :] == mine[:, None]) & (k[None, :] < i[:, None]))
        rank += tl.sum((beats & (k < num_src)[None, :]).to(tl.int32), 1)
    joins = is_src & (i >= protected_src) & (rank < r)
    stays = is_src & (joins == 0)
    u = tl.cumsum(stays.to(tl.int32), 0) - 1 if BY_INDEX else rank - r
    partner = tl.load(index + i, mask=is_src, other=0)
    unmerged_slot = first + tl.where(u < protected_dst, 2 * u, u + protected_dst)
    # What is joined is past protected_dst, so that its slot needs no case.
    slot = tl.where(joins, first + num_unmerged + partner, unmerged_slot)
    token = source_token(sources, i, is_src, first, stride, LISTS)
    tl.debug_barrier()  # all have read the index
    tl.store(index + i, tl.where(joins, partner, -1), mask=is_src)
    tl.debug_barrier()  # the -1s in dest are there, and each thread sees who joins whom
    tl.store(dest + token, slot, mask=is_src)

    j = lanes
    is_dst = j < num_dst
    dst_token = destination_token(destinations, j, is_dst, first, stride, LISTS)
    joined = tl.zeros((BLOCK,), tl.int32)  # how many join destination j
    joined_before = tl.zeros((BLOCK,), tl.int32)  # of them, those before its own token
    for start in range(protected_src, num_src, CHUNK):
        k = start + tl.arange(0, CHUNK)
        same = tl.load(index + k, mask=k < num_src, other=-1)[None, :] == j[:, None]
        k_token = source_token(sources, k, k < num_src, first, stride, LISTS)
        joined += tl.sum(same.to(tl.int32), 1)
        joined_before += tl.sum((same & (k_token[None, :] < dst_token[:, None])).to(tl.int32), 1)

    # Before destination j come the untouched tokens, all unmerged sources, and the destinations below it.
    size = tl.where(is_dst, 1 + joined, 0)
    dst_begin = first + num_unmerged + tl.cumsum(size, 0) - size
    dst_slot = first + num_unmerged + j
    leads = j < protected_dst  # has itself alone for a member, as all slots before it
    dst_slot = tl.where(leads, first + 2 * j + 1, dst_slot)
    dst_begin = tl.where(leads, dst_slot, dst_begin)
    tl.store(dest + dst_token, dst_slot, mask=is_dst)
    tl.store(begin + dst_slot, row + dst_begin, mask=is_dst)
    tl.store(count + dst_slot, size, mask=is_dst)
    tl.store(members + dst_begin + joined_before, row + dst_token, mask=is_dst)

    tl.store(begin + slot, row + slot, mask=stays)
    tl.store(count + slot, 1, mask=stays)
    tl.debug_barrier()  # each thread sees where the destinations begin
    before = tl.zeros((BLOCK,), tl.int32)  # how many of those that join i's destination come before i's token
    for start in range(protected_src, num_src, CHUNK):
        k = start + tl.arange(0, CHUNK)
        same = tl.load(index + k, mask=k < num_src, other=-1)[None, :] == partner[:, None]
        k_token = source_token(sources, k, k < num_src, first, stride, LISTS)
        before += tl.sum((same & (k_token[None, :] < token[:, None])).to(tl.int32), 1)
    before += (destination_token(destinations, partner, joins, first, stride, LISTS) < token).to(tl.int32)
    place = tl.where(joins, tl.load(begin + slot, mask=joins, other=0) - row + before, slot)
    tl.store(members + place, row + token, mask=is_src)
