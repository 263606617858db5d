# SPDX-License-Identifier: MIT
"""Keeping the highest scores in Triton: both views of an image's map in one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.reference.invert import invert
from tokred_kernels.backends.reference.keep_topk import keep_topk as reference_dest
from tokred_kernels.backends.triton import is_nan, on_device
from tokred_kernels.backends.triton.configs import select_config


def keep_topk(scores: Tensor, k: int, first: int, fuse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.keep_topk`: dest, members, begin, count."""
    scores = inner_dense(scores)
    images, tokens = scores.shape
    num_out = first + k + int(fuse)
    config = select_config(tokens - first, 0)
    if config is None:
        dest = reference_dest(scores, k, first, fuse)
        return dest, *invert(dest, num_out)
    dest = scores.new_empty((images, tokens), dtype=torch.int32)
    members = dest.new_empty(images * tokens)
    begin, count = (dest.new_empty((images, num_out)) for _ in range(2))
    if dest.numel():
        with on_device(scores):
            topk_kernel[(images,)](
                *(scores, dest, members, begin, count, scores.stride(0), tokens, first, k),
                FUSE=fuse,
                BLOCK=config.block,
                CHUNK=config.chunk,
                num_warps=config.num_warps,
            )
    return dest, members, begin, count


@triton.jit(do_not_specialize=["tokens", "first", "k"])
def topk_kernel(
    scores,  # (B, N)
    dest,  # out: (B, N)
    members,  # out: (B * N)
    begin,  # out: (B, N')
    count,  # out: (B, N')
    stride_b,
    tokens,
    first,
    k,
    FUSE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program writes both views of one image's map; see csrc/common/args.h for the slots.

    A token's rank is the number of those that beat it, so nothing is sorted and no order depends on timing.
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
    # All slots but the fused one have one member, and are where their number says.
    for start in range(0, first + k, BLOCK):
        slot = start + lanes
        tl.store(begin + slot, row + slot, mask=slot < first + k)
        tl.store(count + slot, 1, mask=slot < first + k)
    for start in range(0, first, BLOCK):
        token = start + lanes
        tl.store(dest + token, token, mask=token < first)
        tl.store(members + token, row + token, mask=token < first)

    candidates = tokens - first
    present = lanes < candidates
    mine = load_scores(scores, lanes, present)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, candidates, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = load_scores(scores, j, j < candidates)
        beats = (other[None, :] > mine[:, None]) | ((other[None, :] == mine[:, None]) & (j[None, :] < lanes[:, None]))
        rank += tl.sum((beats & (j < candidates)[None, :]).to(tl.int32), 1)
    kept = present & (rank < k)
    left = present & (rank >= k)
    place = first + tl.where(kept, rank, k + tl.cumsum(left.to(tl.int32), 0) - 1)
    token = first + lanes
    tl.store(dest + token, tl.where(kept, first + rank, first + k if FUSE else -1), mask=present)
    tl.store(members + place, tl.where(kept | FUSE, row + token, -1), mask=present)
    if FUSE:
        tl.store(begin + first + k, row + first + k)
        tl.store(count + first + k, candidates - k)


@triton.jit
def load_scores(scores, i, mask):
    """Scores i of an image; NaN as the lowest there is."""
    score = tl.load(scores + i, mask=mask, other=float("-inf"))
    return tl.where(is_nan(score), float("-inf"), score)
