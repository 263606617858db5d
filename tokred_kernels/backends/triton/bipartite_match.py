# SPDX-License-Identifier: MIT
"""Match in Triton: the best of each source, then the map of an image in one program.

Above 1024 sources or destinations, `rank_candidates.ranks` and `build_match_map` do the second part, with many
programs per image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.triton.build_match_map import build_match_map
from tokred_kernels.backends.triton.common import on_device
from tokred_kernels.backends.triton.configs import select_config
from tokred_kernels.backends.triton.rank_candidates import (
    best_destination,
    count_before,
    destination_token,
    rank_candidates,
    source_token,
)
from tokred_kernels.partition import Partition


def bipartite_match(metric: Tensor, partition: Partition) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `backends.reference.bipartite_match`; this also writes the second view: dest, members, begin, count."""
    first, stride, num_src, num_dst, protected_src, protected_dst, by_index, r, sources, destinations = partition
    images, tokens, num_out = metric.shape[0], metric.shape[-2], partition.num_out()
    config = select_config(num_src, num_dst)
    if config is None:
        _, partner, rank = rank_candidates(metric, partition)
        return build_match_map(partner, rank, partition, tokens)
    with on_device(metric):
        score, partner = best_destination(metric, partition)
        dest = metric.new_empty((images, tokens), dtype=torch.int32)
        members = metric.new_empty(images * tokens, dtype=torch.int32)
        begin = metric.new_empty((images, num_out), dtype=torch.int32)
        count = metric.new_empty((images, num_out), dtype=torch.int32)
        if images:
            select_kernel[(images,)](
                *(score, partner, sources, destinations, dest, members, begin, count),
                *(tokens, first, stride, num_src, num_dst, protected_src, protected_dst, r),
                LISTS=sources is not None,
                BY_INDEX=by_index,
                BLOCK=config.block,
                CHUNK=config.chunk,
                num_warps=config.num_warps,
            )
    return dest, members, begin, count


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

    # A source's rank is the number of candidates that beat it. If all join, ranks are not needed, and 0 is used.
    i = lanes
    is_src = i < num_src
    last = tl.where(r < num_src - protected_src, num_src, 0)
    rank = count_before(score, i, protected_src, last, CHUNK)
    joins = is_src & (i >= protected_src) & (rank < r)
    stays = is_src & (joins == 0)
    u = tl.cumsum(stays.to(tl.int32), 0) - 1 if BY_INDEX else rank - r
    partner = tl.load(index + i, mask=is_src, other=0)
    unmerged_slot = first + tl.where(u < protected_dst, 2 * u, u + protected_dst)
    # A joined destination is past protected_dst, so its slot needs no extra case.
    slot = tl.where(joins, first + num_unmerged + partner, unmerged_slot)
    token = source_token(sources, i, is_src, first, stride, num_dst, LISTS)
    tl.debug_barrier()  # all have read the index
    tl.store(index + i, tl.where(joins, partner, -1), mask=is_src)
    tl.debug_barrier()  # all -1s are written, and each thread sees all partners
    tl.store(dest + token, slot, mask=is_src)

    j = lanes
    is_dst = j < num_dst
    dst_token = destination_token(destinations, j, is_dst, first, stride, LISTS)
    joined_in = tl.zeros((BLOCK, CHUNK), tl.int32)  # sources that join destination j
    before_in = tl.zeros((BLOCK, CHUNK), tl.int32)  # those of them before its own token
    for start in range(protected_src, num_src, CHUNK):
        k = start + tl.arange(0, CHUNK)
        same = tl.load(index + k, mask=k < num_src, other=-1)[None, :] == j[:, None]
        k_token = source_token(sources, k, k < num_src, first, stride, num_dst, LISTS)
        joined_in += same.to(tl.int32)
        before_in += (same & (k_token[None, :] < dst_token[:, None])).to(tl.int32)
    joined, joined_before = tl.sum(joined_in, 1), tl.sum(before_in, 1)

    # Before destination j come the untouched tokens, all unmerged sources, and the destinations below it.
    size = tl.where(is_dst, 1 + joined, 0)
    dst_begin = first + num_unmerged + tl.cumsum(size, 0) - size
    dst_slot = first + num_unmerged + j
    leads = j < protected_dst  # its only member is itself, as in all slots before it
    dst_slot = tl.where(leads, first + 2 * j + 1, dst_slot)
    dst_begin = tl.where(leads, dst_slot, dst_begin)
    tl.store(dest + dst_token, dst_slot, mask=is_dst)
    tl.store(begin + dst_slot, row + dst_begin, mask=is_dst)
    tl.store(count + dst_slot, size, mask=is_dst)
    tl.store(members + dst_begin + joined_before, row + dst_token, mask=is_dst)

    tl.store(begin + slot, row + slot, mask=stays)
    tl.store(count + slot, 1, mask=stays)
    tl.debug_barrier()  # each thread sees where the destinations begin
    before_in = tl.zeros((BLOCK, CHUNK), tl.int32)  # sources that join the destination of i, before its own token
    for start in range(protected_src, num_src, CHUNK):
        k = start + tl.arange(0, CHUNK)
        same = tl.load(index + k, mask=k < num_src, other=-1)[None, :] == partner[:, None]
        k_token = source_token(sources, k, k < num_src, first, stride, num_dst, LISTS)
        before_in += (same & (k_token[None, :] < token[:, None])).to(tl.int32)
    before = tl.sum(before_in, 1) + (destination_token(destinations, partner, joins, first, stride, LISTS) < token).to(
        tl.int32
    )
    place = tl.where(joins, tl.load(begin + slot, mask=joins, other=0) - row + before, slot)
    tl.store(members + place, row + token, mask=is_src)
