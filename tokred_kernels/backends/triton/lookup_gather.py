# SPDX-License-Identifier: MIT
"""Lookup attention's gather in Triton: programs for blocks of queries and splits of keys, then the sum of splits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.triton.attention_tiles import (
    LN_2,
    LOG2_E,
    head_start,
    launch_options,
    load_vectors,
    multiply,
    products,
    store_rows,
    store_vectors,
)
from tokred_kernels.backends.triton.common import narrow, on_device
from tokred_kernels.backends.triton.configs_attention import architecture_of, lookup_config, lookup_splits
from tokred_kernels.backends.triton.lookup_tiles import (
    combine,
    empty_heads_last,
    few_place,
    parts_of,
    split_at,
    vectors_at,
)


def lookup_gather(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `ops.lookup_gather`: out (B, M, H, d) and lse (B, H, M)."""
    q, k, v = (inner_dense(t) for t in (q, k, v))
    images, heads, compressed, channels = q.shape
    tokens = k.shape[2]
    out, lse = empty_heads_last(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if images * heads == 0:
        return out, lse
    config = lookup_config("gather", compressed, channels, q.dtype, architecture_of(q))
    blocks = triton.cdiv(compressed, config.block_queries)
    splits, share = lookup_splits(images * heads * blocks, tokens, config.block_keys, config.enough)
    parts = parts_of(splits, out, lse)
    with on_device(q):
        gather_kernel[(images * heads * blocks * splits,)](
            *(q, k, v, *parts),
            *(number for t in (q, k, v) for number in t.stride()[:3]),
            *(images, heads, compressed, tokens, blocks, splits, share, scale),
            **launch_options(config, channels),
        )
        if splits > 1:
            combine(parts, [out, lse], softmax=True)
    return out, lse


@triton.jit(do_not_specialize=["images", "heads", "compressed", "tokens", "blocks", "splits", "share"])
def gather_kernel(
    q,  # (B, H, M, d)
    k,  # (B, H, N, d)
    v,  # (B, H, N, d)
    out,  # out: (splits, B, M, H, d)
    lse,  # out: (splits, B, H, M)
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    images,
    heads,
    compressed,
    tokens,
    blocks,
    splits,
    share,  # of the keys, for a split: at least one for the last
    scale,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A program takes BLOCK_QUERIES queries of one head past the keys of a split, as if there were no others."""
    image, head, block, split = few_place(heads, blocks, splits)
    q = head_start(q, image, head, q_stride_b, q_stride_h)
    k = head_start(k, image, head, k_stride_b, k_stride_h)
    v = head_start(v, image, head, v_stride_b, v_stride_h)
    i = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    queries = load_vectors(q, i, compressed, q_stride_n, CHANNELS, BLOCK_CHANNELS)

    highest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    mixed = tl.zeros((BLOCK_QUERIES, BLOCK_CHANNELS), tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, tokens), BLOCK_KEYS):
        j = start + tl.arange(0, BLOCK_KEYS)
        keys = load_vectors(k, j, tokens, k_stride_n, CHANNELS, BLOCK_CHANNELS)
        dots = products(queries, keys)
        scores = tl.where((j < tokens)[None, :], dots * (scale * LOG2_E), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shrink = tl.exp2(highest - higher)
        highest = higher
        seen = tl.exp2(scores - higher[:, None])
        values = load_vectors(v, j, tokens, v_stride_n, CHANNELS, BLOCK_CHANNELS)
        total = total * shrink + tl.sum(seen, 1)
        mixed = multiply(narrow(seen, values.dtype), values, mixed * shrink[:, None])

    at = split_at(split, images, heads, compressed)
    out += at * CHANNELS + vectors_at(image, head, heads, compressed, CHANNELS)
    store_vectors(out, mixed / total[:, None], i, compressed, heads * CHANNELS, CHANNELS, BLOCK_CHANNELS)
    lse += at + (image * heads + head) * compressed
    store_rows(lse, (highest + tl.log2(total)) * LN_2, i, compressed, 1)
