# SPDX-License-Identifier: MIT
"""Keep the highest scores in Triton.

One launch, in which one program writes both views of an image's map. Above 1024 candidates, a launch before it ranks
them with many programs per image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.triton.common import on_device
from tokred_kernels.backends.triton.configs import SCAN_CONFIG, select_config
from tokred_kernels.backends.triton.rank_candidates import count_before, ranks


def keep_topk(scores: Tensor, k: int, first: int, fuse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.keep_topk`: dest, members, begin, count."""
    scores = inner_dense(scores)
    images, tokens = scores.shape
    num_out = first + k + int(fuse)
    dest = scores.new_empty((images, tokens), dtype=torch.int32)
    members = dest.new_empty(images * tokens)
    begin, count = (dest.new_empty((images, num_out)) for _ in range(2))
    if dest.numel():
        config = select_config(tokens - first, 0)
        rank = ranks(scores[:, first:]) if config is None else None
        config = config or SCAN_CONFIG
        with on_device(scores):
            topk_kernel[(images,)](
                *(scores, rank, dest, members, begin, count, scores.stride(0), tokens, first, k),
                RANKED=rank is not None,
                FUSE=fuse,
                BLOCK=config.block,
                CHUNK=config.chunk,
                num_warps=config.num_warps,
            )
    return dest, members, begin, count


@triton.jit(do_not_specialize=["tokens", "first", "k"])
def topk_kernel(
    scores,  # (B, N)
    rank,  # (B, N - first), if RANKED
    dest,  # out: (B, N)
    members,  # out: (B * N)
    begin,  # out: (B, N')
    count,  # out: (B, N')
    stride_b,
    tokens,
    first,
    k,
    RANKED: tl.constexpr,
    FUSE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program writes both views of one image's map; see csrc/common/args.h for the slots.

    Unless RANKED, BLOCK holds all candidates, and the rank of one is the number of those that beat it.
    """
    image = tl.program_id(0).to(tl.int64)
    row = (image * tokens).to(tl.int32)
    num_out = first + k + FUSE
    scores += image * stride_b + first
    dest += image * tokens
    members += image * tokens
    begin += image * num_out
    count += image * num_out
    lanes = tl.arange(0, BLOCK)
    # All slots except the fused one have one member, at the index of the slot.
    for start in range(0, first + k, BLOCK):
        slot = start + lanes
        tl.store(begin + slot, row + slot, mask=slot < first + k)
        tl.store(count + slot, 1, mask=slot < first + k)
    for start in range(0, first, BLOCK):
        token = start + lanes
        tl.store(dest + token, token, mask=token < first)
        tl.store(members + token, row + token, mask=token < first)

    candidates = tokens - first
    if RANKED:
        rank += image * candidates
    others = 0  # candidates of earlier blocks that are not kept
    for start in range(0, candidates, BLOCK):
        i = start + lanes
        present = i < candidates
        own_rank = tl.load(rank + i, mask=present, other=0) if RANKED else count_before(scores, i, 0, candidates, CHUNK)
        kept = present & (own_rank < k)
        other = present & (own_rank >= k)
        place = first + tl.where(kept, own_rank, k + others + tl.cumsum(other.to(tl.int32), 0) - 1)
        others += tl.sum(other.to(tl.int32), 0)
        token = first + i
        tl.store(dest + token, tl.where(kept, first + own_rank, first + k if FUSE else -1), mask=present)
        tl.store(members + place, tl.where(kept | FUSE, row + token, -1), mask=present)
    if FUSE:
        tl.store(begin + first + k, row + first + k)
        tl.store(count + first + k, candidates - k)
