# SPDX-License-Identifier: MIT
"""The map of a match in Triton.

One launch writes `dest`, one program per image; `to_csr.collect_members` adds one or two. By estimate the first takes a
few microseconds on an H100 up to 4,000 sources, and about one more for each further 1,000.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.triton.common import on_device
from tokred_kernels.backends.triton.configs import SCAN_CONFIG
from tokred_kernels.backends.triton.rank_candidates import destination_token, packed_rows, source_token
from tokred_kernels.backends.triton.to_csr import collect_members
from tokred_kernels.partition import Partition


def build_match_map(
    partner: Tensor,
    rank: Tensor,
    partition: Partition,
    num_tokens: int,
    counts: Tensor | None = None,
    starts_in: Tensor | None = None,
    starts_out: Tensor | None = None,
    num_out: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.build_match_map`: dest, members, begin, count."""
    first, stride, num_src, num_dst, protected_src, protected_dst, by_index, r, sources, destinations = partition
    images = partner.shape[0]
    slots = (images, partition.num_out()) if counts is None else (num_out,)
    dest = partner.new_empty((num_tokens,) if starts_in is not None else (images, num_tokens))
    begin, count = partner.new_empty(slots), partner.new_empty(slots)
    if images:
        with on_device(partner):
            dest_kernel[(images,)](
                *(partner, rank, sources, destinations, counts, starts_in, starts_out, dest, num_tokens),
                *(first, stride, num_src, num_dst, protected_src, protected_dst, r),
                LISTS=sources is not None,
                BY_INDEX=by_index,
                PACKED_IN=starts_in is not None,
                PACKED_OUT=counts is not None,
                BLOCK=SCAN_CONFIG.block,
                num_warps=SCAN_CONFIG.num_warps,
            )
    tokens = first + num_src + num_dst if starts_in is not None else num_tokens  # of the longest image
    most_slots = partition.num_out() if counts is None else first + num_src + num_dst
    members = collect_members(dest, images, tokens, most_slots, begin, count, starts_in, starts_out)
    return dest, members, begin, count


@triton.jit(
    do_not_specialize=["tokens", "first", "stride", "num_src", "num_dst", "protected_src", "protected_dst", "r"]
)
def dest_kernel(
    partner,  # (B, num_src)
    rank,  # (B, num_src)
    sources,  # (B, num_src), or None
    destinations,  # (B, num_dst), or None
    counts,  # (B), if PACKED_OUT
    starts_in,  # (B + 1), if PACKED_IN
    starts_out,  # (B + 1), if PACKED_OUT
    dest,  # out: (B, N), or, if PACKED_IN, (T)
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
    PACKED_IN: tl.constexpr,
    PACKED_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program writes the slots of one image's tokens; see csrc/common/args.h for the formulas."""
    image = tl.program_id(0).to(tl.int64)
    partner += image * num_src
    rank += image * num_src
    if LISTS:
        sources += image * num_src
        destinations += image * num_dst
    row, slot0 = image * tokens, 0
    if PACKED_IN:
        row, tokens = packed_rows(starts_in, image)
        num_src, num_dst = (tokens + 1) // 2, tokens // 2
    if PACKED_OUT:
        r = tl.load(counts + image)
        slot0 = tl.load(starts_out + image)
    dest += row

    # If no source joins, all tokens that are kept stay in place. Otherwise only the first ones do.
    lanes = tl.arange(0, BLOCK)
    in_place = tl.where(r == 0, first + num_src + num_dst, first)
    for start in range(0, tokens, BLOCK):
        token = start + lanes
        tl.store(dest + token, tl.where(token < in_place, slot0 + token, -1), mask=token < tokens)
    if r > 0:
        tl.debug_barrier()  # the slots overwrite the -1s
        num_unmerged = num_src - r
        # Protected destinations alternate with unmerged sources until one of the two runs out.
        interleaved = tl.minimum(protected_dst, num_unmerged)
        first_slot = slot0 + first
        for start in range(0, num_dst, BLOCK):
            j = start + lanes
            token = destination_token(destinations, j, j < num_dst, first, stride, LISTS)
            slot = tl.where(j < interleaved, 2 * j + 1, num_unmerged + j)
            tl.store(dest + token, first_slot + slot, mask=j < num_dst)
        joined = 0  # number of joining sources in earlier blocks
        for start in range(0, num_src, BLOCK):
            i = start + lanes
            is_src = i < num_src
            own_rank = tl.load(rank + i, mask=is_src, other=r)
            joins = own_rank < r
            u = tl.where(i < protected_src, i, protected_src + own_rank - r)
            if BY_INDEX:
                u = i - joined - tl.cumsum(joins.to(tl.int32), 0)
                joined += tl.sum(joins.to(tl.int32), 0)
            j = tl.load(partner + i, mask=joins, other=0)
            joined_slot = tl.where(j < interleaved, 2 * j + 1, num_unmerged + j)
            slot = tl.where(u < interleaved, 2 * u, u + interleaved)
            token = source_token(sources, i, is_src, first, stride, num_dst, LISTS)
            tl.store(dest + token, first_slot + tl.where(joins, joined_slot, slot), mask=is_src)
