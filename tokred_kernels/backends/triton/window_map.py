# SPDX-License-Identifier: MIT
"""The map that merges the most similar windows, in Triton.

Two launches: `rank_candidates.ranks` of the windows, then one program per image. Given the ranks, the places of tokens
that merge have a closed form, and a running sum gives the others. Latency bounds both launches at ViT sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.triton.common import on_device
from tokred_kernels.backends.triton.configs import SCAN_CONFIG
from tokred_kernels.backends.triton.rank_candidates import ranks
from tokred_kernels.windows import Windows


def window_map(
    score: Tensor,
    windows: Windows,
    r: int,
    counts: Tensor | None = None,
    starts_out: Tensor | None = None,
    num_out: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.window_map`: dest, members, begin, count."""
    images, tokens = score.shape[0], windows.num_tokens()
    slots = (images, tokens - r * (windows.size() - 1)) if counts is None else (num_out,)
    dest = score.new_empty((images, tokens), dtype=torch.int32)
    members = dest.new_empty(images * tokens)
    begin, count = dest.new_empty(slots), dest.new_empty(slots)
    if dest.numel():
        rank = ranks(score.contiguous())
        with on_device(score):
            window_map_kernel[(images,)](
                *(rank, counts, starts_out, dest, members, begin, count, windows.number(), tokens, r),
                *(windows.first, windows.grid_width, windows.height, windows.width, windows.down(), windows.across()),
                PACKED=counts is not None,
                BLOCK=SCAN_CONFIG.block,
                num_warps=SCAN_CONFIG.num_warps,
            )
    return dest, members, begin, count


@triton.jit(
    do_not_specialize=[
        *("num_windows", "tokens", "r", "first", "grid_width", "height", "width", "down", "across"),
    ]
)
def window_map_kernel(
    rank,  # (B, W)
    counts,  # (B), if PACKED
    starts_out,  # (B + 1), if PACKED
    dest,  # out: (B, N)
    members,  # out: (B * N)
    begin,  # out: (B, N'), or, if PACKED, (T')
    count,  # out: as begin
    num_windows,
    tokens,
    r,
    first,
    grid_width,
    height,
    width,
    down,
    across,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program writes both views of one image's map; see csrc/common/args.h for the slots."""
    image = tl.program_id(0).to(tl.int64)
    size = height * width
    slot0 = 0
    slot_row = image * (tokens - r * (size - 1))
    if PACKED:
        r = tl.load(counts + image)
        slot0 = tl.load(starts_out + image)
        slot_row = slot0.to(tl.int64)
    row = (image * tokens).to(tl.int32)
    rank += image * num_windows
    dest += image * tokens
    members += image * tokens
    begin += slot_row
    count += slot_row
    others = 0  # grid tokens of earlier blocks that do not merge
    for start in range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        present, in_grid = token < tokens, (token >= first) & (token < tokens)
        y, x = tl.maximum(token - first, 0) // grid_width, tl.maximum(token - first, 0) % grid_width
        in_window = in_grid & (y // height < down) & (x // width < across)
        own_rank = tl.load(rank + y // height * across + x // width, mask=in_window, other=0)
        merged = in_window & (own_rank < r)
        other = in_grid & (merged == 0)
        before = others + tl.cumsum(other.to(tl.int32), 0) - 1
        others += tl.sum(other.to(tl.int32), 0)
        slot = tl.where(merged, first + own_rank, tl.where(other, first + r + before, token))
        at = tl.where(merged, first + own_rank * size, tl.where(other, first + r * size + before, token))
        place = tl.where(merged, y % height * width + x % width, 0)
        tl.store(dest + token, slot0 + slot, mask=present)
        tl.store(members + at + place, row + token, mask=present)
        tl.store(begin + slot, row + at, mask=present & (place == 0))
        tl.store(count + slot, tl.where(merged, size, 1), mask=present & (place == 0))
