# SPDX-License-Identifier: MIT
"""Token attention in Triton: each program takes a block of queries and all keys, with an online softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.layout import attention_layout
from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.triton.attention_tiles import (
    EPS,
    LN_2,
    LOG2_E,
    finite_level,
    first_highest,
    head_start,
    head_strides,
    is_whole,
    key_block,
    key_terms,
    launch_options,
    load_block,
    load_rows,
    load_tokens,
    load_vectors,
    multiply,
    products,
    row_softmax,
    rows_place,
    shares,
    sizes,
    store_rows,
    store_vectors,
    weight_share,
)
from tokred_kernels.backends.triton.common import narrow, on_device
from tokred_kernels.backends.triton.configs_attention import architecture_of, attention_config, importance_config

# Weights are scaled by this before they are rounded to float16. Kept keys can score far below a dropped key: their
# weights are tiny but keep all digits, since they are divided by an equally small sum.
_HALF_RANGE = tl.constexpr(2.0**14)
_HEADS_AT_ONCE = tl.constexpr(4)


def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    policy: Tensor | None,
    starts: Tensor | None,
    longest: int,
    scale: float,
    importance: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.token_attention`: out (heads last), the row maxima and sums for the backward, and the importance."""
    q, k, v = (inner_dense(t) for t in (q, k, v))
    images, heads, tokens, channels = sizes(q, starts, longest)
    layout = attention_layout(q, starts)
    out = q.new_empty(layout)
    row_max, row_sum = (q.new_empty(layout[:-1], dtype=torch.float32) for _ in range(2))
    importance_out = q.new_empty(layout[:-2] if importance else (0,), dtype=torch.float32)
    top = None
    if importance and policy is not None:
        top = row_max.new_empty(row_max.shape, dtype=torch.int32)
    modes = {"BIAS": bias is not None, "POLICY": policy is not None, "PACKED": starts is not None}
    of = (channels, q.dtype, policy is not None, architecture_of(q))
    with on_device(q):
        config = attention_config(*of)
        grid, blocks = shares(images, heads, tokens, config.block_queries)
        if grid[0]:
            attention_kernel[grid](
                *(q, k, v, bias, policy, starts, out, row_max, row_sum, top),
                *(number for t in (q, k, v) for number in head_strides(t, starts)),
                *(heads, tokens, blocks, scale),
                **modes,
                TOP=top is not None,
                WHOLE=is_whole(config, tokens, policy, starts),
                **launch_options(config, channels),
            )
        config = importance_config(*of, importance)
        grid, blocks = shares(images, 1, tokens, config.block_keys)
        if importance and grid[0]:
            importance_kernel[grid](
                *(q, k, bias, policy, starts, row_max, row_sum, top, importance_out),
                *(number for t in (q, k) for number in head_strides(t, starts)),
                *(heads, tokens, blocks, scale),
                **modes,
                IMPORTANCE=importance,
                **launch_options(config, channels),
            )
    return out, row_max, row_sum, importance_out


@triton.jit(do_not_specialize=["heads", "tokens", "blocks"])
def attention_kernel(
    q,  # (B, H, N, d), or, if PACKED, (T, H, d); k and v likewise
    k,
    v,
    bias,  # (rows), if BIAS
    policy,  # (rows), if POLICY
    starts,  # (B + 1), if PACKED
    out,  # out: (rows, H, d)
    row_max,  # out: (rows, H), the highest score
    row_sum,  # out: (rows, H), what weights are divided by
    top,  # out: (rows, H), the first key of highest score, if TOP
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    heads,
    tokens,
    blocks,
    scale,
    BIAS: tl.constexpr,
    POLICY: tl.constexpr,
    PACKED: tl.constexpr,
    TOP: tl.constexpr,
    WHOLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A program takes BLOCK_QUERIES queries of one head past all keys; the equation is in csrc/common/args.h.

    Keys of the last block that do not count have a term of -infinity, so that it needs no case; see `key_block`.
    """
    image, head, block, first, count = rows_place(starts, heads, tokens, blocks, PACKED)
    if block * BLOCK_QUERIES >= count:
        return
    q = head_start(q, image, head, q_stride_b, q_stride_h, q_stride_n, first, PACKED)
    k = head_start(k, image, head, k_stride_b, k_stride_h, k_stride_n, first, PACKED)
    v = head_start(v, image, head, v_stride_b, v_stride_h, v_stride_n, first, PACKED)
    i = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    queries = load_vectors(q, i, count, q_stride_n, CHANNELS, BLOCK_CHANNELS)
    factor = _HALF_RANGE if POLICY and v.dtype.element_ty == tl.float16 else 1.0

    highest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    highest_key = tl.full((BLOCK_QUERIES,), -1, tl.int32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    mixed = tl.zeros((BLOCK_QUERIES, BLOCK_CHANNELS), tl.float32)
    value_sum = tl.zeros((BLOCK_CHANNELS,), tl.float32)
    for start in range(0, count, BLOCK_KEYS):
        begin, j, present = key_block(start, count, BLOCK_KEYS, WHOLE)
        keys = load_block(k, begin, j, count, k_stride_n, CHANNELS, BLOCK_CHANNELS, WHOLE)
        dots = products(queries, keys)
        scores = dots * (scale * LOG2_E) + key_terms(bias, first, j, present, BIAS, WHOLE)[None, :]
        best = tl.max(scores, 1)
        if TOP:
            highest_key = first_highest(scores, best, j, highest, highest_key)
        higher = tl.maximum(highest, best)
        level = finite_level(higher)
        shrink = tl.exp2(highest - level)
        highest = higher
        seen = tl.exp2(scores - level[:, None])
        values = load_block(v, begin, j, count, v_stride_n, CHANNELS, BLOCK_CHANNELS, WHOLE)
        if POLICY:
            kept = load_tokens(policy, first, j, count)
            seen *= tl.where(i[:, None] == j[None, :], factor, (factor * kept)[None, :])
            value_sum += tl.sum(values.to(tl.float32), 0)
        total = total * shrink + tl.sum(seen, 1)
        mixed = multiply(narrow(seen, values.dtype), values, mixed * shrink[:, None])

    if POLICY:
        least = factor * EPS / count.to(tl.float32)
        total += factor * EPS
        mixed += least * value_sum[None, :]
    mixed /= total[:, None]
    at = first * heads + head
    store_vectors(out + at * CHANNELS, mixed, i, count, heads * CHANNELS, CHANNELS, BLOCK_CHANNELS)
    store_rows(row_max + at, highest * LN_2, i, count, heads)
    store_rows(row_sum + at, total / factor, i, count, heads)
    if TOP:
        store_rows(top + at, highest_key, i, count, heads)


@triton.jit(do_not_specialize=["heads", "tokens", "blocks"])
def importance_kernel(
    q,  # (B, H, N, d), or, if PACKED, (T, H, d); k likewise
    k,
    bias,  # (rows), if BIAS
    policy,  # (rows), if POLICY
    starts,  # (B + 1), if PACKED
    row_max,  # (rows, H)
    row_sum,  # (rows, H)
    top,  # (rows, H), the first key of highest score, if POLICY: its exponential is 1, however its score rounds here
    importance_out,  # out: (rows)
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    heads,
    tokens,
    blocks,
    scale,
    BIAS: tl.constexpr,
    POLICY: tl.constexpr,
    PACKED: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A program sums the weights of BLOCK_KEYS keys of one image, head by head: no order depends on timing.

    It needs one query of each head, or, for the mean, all of them, a block at a time.
    """
    image, _, block, first, count = rows_place(starts, 1, tokens, blocks, PACKED)
    if block * BLOCK_KEYS >= count:
        return
    j = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    terms = key_terms(bias, first, j, j < count, BIAS)
    if POLICY:
        kept = load_tokens(policy, first, j, count)
        least = EPS / count.to(tl.float32)
    sums = tl.zeros((BLOCK_KEYS,), tl.float32)
    # One query of each head is little work after a long load of its keys, so several heads load at once.
    for number in tl.range(heads, loop_unroll_factor=1 if IMPORTANCE == "mean" else _HEADS_AT_ONCE):
        head = number + tl.zeros((), tl.int32)
        q_head = head_start(q, image, head, q_stride_b, q_stride_h, q_stride_n, first, PACKED)
        k_head = head_start(k, image, head, k_stride_b, k_stride_h, k_stride_n, first, PACKED)
        keys = load_vectors(k_head, j, count, k_stride_n, CHANNELS, BLOCK_CHANNELS)
        at = first * heads + head
        if IMPORTANCE == "mean":
            for start in range(0, count, BLOCK_QUERIES):
                i = start + tl.arange(0, BLOCK_QUERIES)
                queries = load_vectors(q_head, i, count, q_stride_n, CHANNELS, BLOCK_CHANNELS)
                dots = products(keys, queries)
                level, inverse = row_softmax(row_max + at, row_sum + at, i, count, heads)
                seen = tl.exp2(dots * (scale * LOG2_E) + terms[:, None] - level[None, :])
                if POLICY:
                    is_top = load_rows(top + at, i, count, heads, -1)[None, :] == j[:, None]
                    seen = tl.where(is_top, 1.0, seen)
                    seen = tl.where(i[None, :] == j[:, None], seen, seen * kept[:, None]) + least
                sums += tl.sum(seen * tl.where(i < count, inverse, 0.0)[None, :], 1)
        else:
            i = tl.zeros((), tl.int32) if IMPORTANCE == "class" else count - 1
            c = tl.arange(0, BLOCK_CHANNELS)
            query = tl.load(q_head + i.to(tl.int64) * q_stride_n + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
            dots = tl.sum(keys.to(tl.float32) * query[None, :], 1)
            level = load_rows(row_max + at, i, count, heads, 0.0) * LOG2_E
            seen = tl.exp2(dots * (scale * LOG2_E) + terms - level)
            if POLICY:
                seen = tl.where(j == load_rows(top + at, i, count, heads, -1), 1.0, seen)
                seen = tl.where(j == i, seen, seen * kept) + least
            sums += seen / load_rows(row_sum + at, i, count, heads, 1.0)
    tl.store(importance_out + first + j, sums * weight_share(heads, count, IMPORTANCE), mask=j < count)
