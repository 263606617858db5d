# SPDX-License-Identifier: MIT
"""The terms of each row of weights that all gradients of token attention need."""

from __future__ import annotations

import triton
import triton.language as tl

from tokred_kernels.backends.triton.attention_tiles import (
    EPS,
    LOG2_E,
    counts_query,
    finite_level,
    first_highest,
    head_start,
    key_terms,
    load_rows,
    load_tokens,
    load_vectors,
    products,
    row_softmax,
    rows_apart,
    rows_place,
    store_rows,
    weight_share,
)


@triton.jit(do_not_specialize=["heads", "tokens", "blocks"])
def rows_kernel(
    q,  # (B, H, N, d), or, if PACKED, (T, H, d); k, v and grad_out likewise
    k,
    v,
    grad_out,
    bias,  # (rows), if BIAS
    policy,  # (rows), if POLICY
    starts,  # (B + 1), if PACKED
    grad_importance,  # (rows), if IMPORTANCE
    row_max,  # (rows, H), unless POLICY; row_sum and out likewise
    row_sum,  # (rows, H)
    out,  # (rows, H, d)
    delta,  # out: (B, H, padded), or, if PACKED, (rows, H): sum_j a_ij g_ij
    level,  # out: as delta: the highest score if POLICY, else the logarithm of the sum of exponentials; in base 2
    top,  # out: as delta: the first key of highest score, if POLICY
    shift,  # out: as delta: what the gradient of that key's score is reduced by, if POLICY
    inverse_sum,  # out: as delta: 1 / Z_i, if POLICY
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    g_stride_b,
    g_stride_h,
    g_stride_n,
    heads,
    tokens,
    blocks,
    padded,
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
    """A program has BLOCK_QUERIES queries of one head; csrc/cpu/token_attention_backward.cpp has the equations.

    Without a policy, D_i = sum_j a_ij g_ij is the product of the output and its gradient, plus the share of the
    importance, which needs a pass over the keys.

    With a policy, one pass over the keys computes the highest score, Z_i and D_i from the same scores. With
    S_i = sum_j e_ij m_ij, Z_i = S_i + eps, and G_i the mean of g_ij over j:
        D_i - G_i = (sum_j e_ij m_ij g_ij - S_i G_i) / Z_i,
        sum_j ds_ij = eps (D_i - G_i) / Z_i, which the highest score's gradient is reduced by.
    D_i and G_i are not subtracted, because D_i - G_i may be far smaller than both.
    """
    image, head, block, first, count = rows_place(starts, heads, tokens, blocks, PACKED)
    if PACKED and block * BLOCK_QUERIES >= count:
        return
    q = head_start(q, image, head, q_stride_b, q_stride_h, q_stride_n, first, PACKED)
    k = head_start(k, image, head, k_stride_b, k_stride_h, k_stride_n, first, PACKED)
    v = head_start(v, image, head, v_stride_b, v_stride_h, v_stride_n, first, PACKED)
    grad_out = head_start(grad_out, image, head, g_stride_b, g_stride_h, g_stride_n, first, PACKED)
    at = first * heads + head
    start, stride = rows_apart(image, head, first, heads, padded, PACKED)
    i = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    written = count if PACKED else padded
    grads = load_vectors(grad_out, i, count, g_stride_n, CHANNELS, BLOCK_CHANNELS)
    if IMPORTANCE != "":
        share = tl.where(counts_query(i, count, IMPORTANCE), weight_share(heads, count, IMPORTANCE), 0.0)

    if POLICY:
        queries = load_vectors(q, i, count, q_stride_n, CHANNELS, BLOCK_CHANNELS)
        highest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
        highest_key = tl.full((BLOCK_QUERIES,), -1, tl.int32)
        kept_sum = tl.zeros((BLOCK_QUERIES,), tl.float32)
        kept_grad_sum = tl.zeros((BLOCK_QUERIES,), tl.float32)
        grad_sum = tl.zeros((BLOCK_QUERIES,), tl.float32)
        for begin in range(0, count, BLOCK_KEYS):
            j = begin + tl.arange(0, BLOCK_KEYS)
            keys = load_vectors(k, j, count, k_stride_n, CHANNELS, BLOCK_CHANNELS)
            dots = products(queries, keys)
            scores = dots * (scale * LOG2_E) + key_terms(bias, first, j, j < count, BIAS)[None, :]
            best = tl.max(scores, 1)
            highest_key = first_highest(scores, best, j, highest, highest_key)
            higher = tl.maximum(highest, best)
            own_level = finite_level(higher)
            shrink = tl.exp2(highest - own_level)
            highest = higher
            kept = load_tokens(policy, first, j, count)
            seen = tl.exp2(scores - own_level[:, None])
            seen = tl.where(i[:, None] == j[None, :], seen, seen * kept[None, :])
            values = load_vectors(v, j, count, v_stride_n, CHANNELS, BLOCK_CHANNELS)
            reached = products(grads, values)
            if IMPORTANCE != "":
                reached += share[:, None] * load_tokens(grad_importance, first, j, count)[None, :]
            kept_sum = kept_sum * shrink + tl.sum(seen, 1)
            kept_grad_sum = kept_grad_sum * shrink + tl.sum(seen * reached, 1)
            grad_sum += tl.sum(reached, 1)
        mean = grad_sum / count.to(tl.float32)
        inverse = 1.0 / (kept_sum + EPS)
        difference = (kept_grad_sum - kept_sum * mean) * inverse
        # Rows of the padding, which other kernels read without a mask, must add nothing.
        present = i < count
        own_level = tl.where(present, finite_level(highest), float("inf"))
        total = tl.where(present, mean + difference, 0.0)
        store_rows(top + start, tl.where(present, highest_key, -1), i, written, stride)
        store_rows(shift + start, tl.where(present, EPS * difference * inverse, 0.0), i, written, stride)
        store_rows(inverse_sum + start, tl.where(present, inverse, 1.0), i, written, stride)
    else:
        outs = load_vectors(out + at * CHANNELS, i, count, heads * CHANNELS, CHANNELS, BLOCK_CHANNELS)
        total = tl.sum(grads.to(tl.float32) * outs.to(tl.float32), 1)
        own_level, inverse = row_softmax(row_max + at, row_sum + at, i, count, heads)
        if IMPORTANCE != "":
            limit = count
            if IMPORTANCE == "class":
                limit = tl.where(block == 0, count, 0)
            if IMPORTANCE == "last":
                limit = tl.where((block + 1) * BLOCK_QUERIES >= count, count, 0)
            queries = load_vectors(q, i, count, q_stride_n, CHANNELS, BLOCK_CHANNELS)
            weighted = tl.zeros((BLOCK_QUERIES,), tl.float32)  # of the row's weights
            for begin in range(0, limit, BLOCK_KEYS):
                j = begin + tl.arange(0, BLOCK_KEYS)
                keys = load_vectors(k, j, count, k_stride_n, CHANNELS, BLOCK_CHANNELS)
                dots = products(queries, keys)
                scores = dots * (scale * LOG2_E) + key_terms(bias, first, j, j < count, BIAS)[None, :]
                seen = tl.exp2(scores - own_level[:, None])
                weighted += tl.sum(seen * load_tokens(grad_importance, first, j, count)[None, :], 1)
            total += weighted * inverse * share
        own_level += tl.log2(load_rows(row_sum + at, i, count, heads, 1.0))
    store_rows(level + start, own_level, i, written, stride)
    store_rows(delta + start, total, i, written, stride)
