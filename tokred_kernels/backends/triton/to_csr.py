# SPDX-License-Identifier: MIT
"""The second view of a map in Triton: a stable sort of each image's tokens by slot.

Up to `COUNTED_PAIRS` the sort is by counting: the place of a token is the number of tokens that precede it, and a slot
begins after the tokens of lower slots. That takes one launch and N (N + N') comparisons per image, in many programs: by
estimate a few microseconds on an H100 at ViT sizes, and about 30 at the limit. Larger maps, such as one image of 12,000
tokens or 64 images of 1,500, take two launches: `torch.sort`, then a binary search for each slot.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.triton.common import on_device
from tokred_kernels.backends.triton.configs import RANK_CONFIG
from tokred_kernels.backends.triton.rank_candidates import packed_rows

COUNTED_PAIRS = 1 << 28
_DROPPED = tl.constexpr(2**31 - 1)  # the slot by which dropped tokens sort last; above any other


def to_csr(dest: Tensor, num_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `token_map_ops.to_csr`."""
    batch, tokens = dest.shape
    begin, count = (dest.new_empty((batch, num_out)) for _ in range(2))
    return collect_members(dest.contiguous(), batch, tokens, num_out, begin, count), begin, count


def collect_members(
    dest: Tensor,
    images: int,
    tokens: int,
    num_out: int,
    begin: Tensor,
    count: Tensor,
    starts_in: Tensor | None = None,
    starts_out: Tensor | None = None,
) -> Tensor:
    """Return the members of each slot, and write `begin` and `count`.

    Args:
        dest: contiguous, (B, N), or (T,) with `starts_in`.
        images: B.
        tokens: N, the largest N of any image with `starts_in`.
        num_out: N', or an upper bound for any image with `starts_out`.
        begin, count: outputs, (B, N'), or (T',) with `starts_out`.
        starts_in: (B + 1,), the first row of each image if tokens are packed.
        starts_out: (B + 1,), the first slot of each image if slots are packed. `dest` then holds such rows.
    """
    members = dest.new_empty(dest.numel())
    sort = images * tokens * (tokens + num_out) > COUNTED_PAIRS
    if sort and starts_out is not None:  # all slots have one numbering, so the images are one
        images, tokens, num_out, starts_in, starts_out = 1, dest.numel(), begin.numel(), None, None
    token_blocks = triton.cdiv(tokens, RANK_CONFIG.block)
    blocks = token_blocks + triton.cdiv(num_out, RANK_CONFIG.block)
    if images * blocks == 0:
        return members
    with on_device(dest):
        if sort:
            keys, order = dest.view(images, tokens).sort(dim=1, stable=True)
            sorted_members_kernel[(images * blocks,)](
                *(keys, order, members, begin, count, tokens, num_out, token_blocks, blocks, tokens.bit_length()),
                BLOCK=RANK_CONFIG.block,
                num_warps=RANK_CONFIG.num_warps,
            )
        else:
            members_kernel[(images * blocks,)](
                *(dest, starts_in, starts_out, members, begin, count, tokens, num_out, token_blocks, blocks),
                PACKED_IN=starts_in is not None,
                PACKED_OUT=starts_out is not None,
                BLOCK=RANK_CONFIG.block,
                CHUNK=RANK_CONFIG.chunk,
                num_warps=RANK_CONFIG.num_warps,
            )
    return members


@triton.jit(do_not_specialize=["tokens", "num_out", "token_blocks", "blocks"])
def members_kernel(
    dest,  # (rows)
    starts_in,  # (B + 1), if PACKED_IN
    starts_out,  # (B + 1), if PACKED_OUT
    members,  # out: (rows)
    begin,  # out: (slots)
    count,  # out: (slots)
    tokens,
    num_out,
    token_blocks,
    blocks,
    PACKED_IN: tl.constexpr,
    PACKED_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program places BLOCK tokens of one image among its members, or finds where BLOCK of its slots begin."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    row, slot_row, slot0 = image * tokens, image * num_out, 0
    if PACKED_IN:
        row, tokens = packed_rows(starts_in, image)
    if PACKED_OUT:
        slot_row, num_out = packed_rows(starts_out, image)
        slot0 = slot_row.to(tl.int32)
    dest += row
    lanes, chunk = tl.arange(0, BLOCK), tl.arange(0, CHUNK)
    if block < token_blocks:
        start = block * BLOCK
        i = start + lanes
        mine = sort_keys(dest, i, tokens)
        place = tl.zeros((BLOCK, CHUNK), tl.int32)
        for k in range(0, tl.minimum(start, tokens), CHUNK):
            place += (sort_keys(dest, k + chunk, tokens)[None, :] <= mine[:, None]).to(tl.int32)
        for k in range(start, tl.minimum(start + BLOCK, tokens), CHUNK):
            other, earlier = sort_keys(dest, k + chunk, tokens)[None, :], (k + chunk)[None, :] < i[:, None]
            place += ((other < mine[:, None]) | ((other == mine[:, None]) & earlier)).to(tl.int32)
        for k in range(start + BLOCK, tokens, CHUNK):
            place += (sort_keys(dest, k + chunk, tokens)[None, :] < mine[:, None]).to(tl.int32)
        member = tl.where(mine == _DROPPED, -1, row.to(tl.int32) + i)
        tl.store(members + row + tl.sum(place, 1), member, mask=i < tokens)
    else:
        first_slot = (block - token_blocks) * BLOCK
        slot = first_slot + lanes
        key = slot0 + slot
        before = tl.zeros((BLOCK, CHUNK), tl.int32)
        size = tl.zeros((BLOCK, CHUNK), tl.int32)
        for k in range(0, tl.where(first_slot < num_out, tokens, 0), CHUNK):
            other = sort_keys(dest, k + chunk, tokens)[None, :]
            before += (other < key[:, None]).to(tl.int32)
            size += (other == key[:, None]).to(tl.int32)
        tl.store(begin + slot_row + slot, row.to(tl.int32) + tl.sum(before, 1), mask=slot < num_out)
        tl.store(count + slot_row + slot, tl.sum(size, 1), mask=slot < num_out)


@triton.jit
def sort_keys(dest, i, tokens):
    """Return the slots of tokens i; dropped tokens get a slot above all others."""
    slot = tl.load(dest + i, mask=i < tokens, other=-1)
    return tl.where(slot < 0, _DROPPED, slot)


@triton.jit(do_not_specialize=["tokens", "num_out", "token_blocks", "blocks", "steps"])
def sorted_members_kernel(
    keys,  # (B, N): dest, sorted
    order,  # (B, N), int64: the token of each key
    members,  # out: (B * N)
    begin,  # out: (B, N')
    count,  # out: (B, N')
    tokens,
    num_out,
    token_blocks,
    blocks,
    steps,  # of a binary search in N keys
    BLOCK: tl.constexpr,
):
    """A program writes BLOCK members of one image, or finds where BLOCK of its slots begin."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    row = (image * tokens).to(tl.int32)
    keys += image * tokens
    lanes = tl.arange(0, BLOCK)
    dropped = lower_bound(keys, tokens, tl.zeros((BLOCK,), tl.int32), steps)  # their -1 sorts first
    if block < token_blocks:
        m = block * BLOCK + lanes
        kept = m < tokens - dropped
        token = tl.load(order + image * tokens + dropped.to(tl.int64) + m, mask=kept, other=0).to(tl.int32)
        tl.store(members + image * tokens + m, tl.where(kept, row + token, -1), mask=m < tokens)
    else:
        slot = (block - token_blocks) * BLOCK + lanes
        first = lower_bound(keys, tokens, slot, steps)
        size = lower_bound(keys, tokens, slot + 1, steps) - first
        tl.store(begin + image * num_out + slot, row + first - dropped, mask=slot < num_out)
        tl.store(count + image * num_out + slot, size, mask=slot < num_out)


@triton.jit
def lower_bound(keys, number, wanted, steps):
    """Return the number of sorted keys below `wanted`, by binary search."""
    low = tl.zeros_like(wanted)
    high = low + number
    for _ in range(steps):
        middle = low + (high - low) // 2
        below = (low < high) & (tl.load(keys + middle, mask=low < high, other=0) < wanted)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low
