# SPDX-License-Identifier: MIT
"""What the gradients of token attention need of each row of weights, before any of them is known."""

from __future__ import annotations

import triton
import triton.language as tl

from tokred_kernels.backends.triton.attention_tiles import (
    EPS,
    LOG2_E,
    counts_query,
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
    grad_worth,  # (rows), if IMPORTANCE
    row_max,  # (rows, H)
    row_sum,  # (rows, H)
    out,  # (rows, H, d)
    delta,  # out: (B, H, padded), or, if PACKED, (rows, H), sum_j a_ij g_ij
    level,  # out: as delta, what makes weights of scores in base 2, but for the sum if POLICY
    top,  # out: (rows, H), the first key of highest score, if POLICY
    shift,  # out: (rows, H), the gradient of that score as what all others are taken from, if POLICY
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

    What the output gives of sum_j a_ij g_ij is the product of the output and its gradient. Only what the importance
    gives, and a policy, take a walk past the keys. With D_i that sum, and G_i the mean of g_ij over j, the highest
    score gets - sum_j ds_ij = - eps (D_i - G_i) / Z_i: what is left of a difference that cancels but for eps.
    """
    image, head, block, first, count = rows_place(starts, heads, tokens, blocks, PACKED)
    if PACKED and block * BLOCK_QUERIES >= count:
        return
    q = head_start(q, image, head, q_stride_b, q_stride_h, q_stride_n, first, PACKED)
    k = head_start(k, image, head, k_stride_b, k_stride_h, k_stride_n, first, PACKED)
    v = head_start(v, image, head, v_stride_b, v_stride_h, v_stride_n, first, PACKED)
    grad_out = head_start(grad_out, image, head, g_stride_b, g_stride_h, g_stride_n, first, PACKED)
    at = first * heads + head
    i = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    grads = load_vectors(grad_out, i, count, g_stride_n, CHANNELS, BLOCK_CHANNELS).to(tl.float32)
    outs = load_vectors(out + at * CHANNELS, i, count, heads * CHANNELS, CHANNELS, BLOCK_CHANNELS).to(tl.float32)
    total = tl.sum(grads * outs, 1)
    own_level, inverse = row_softmax(row_max + at, row_sum + at, i, count, heads)

    if POLICY or IMPORTANCE != "":
        limit = count
        if IMPORTANCE == "class" and not POLICY:
            limit = tl.where(block == 0, count, 0)
        if IMPORTANCE == "last" and not POLICY:
            limit = tl.where((block + 1) * BLOCK_QUERIES >= count, count, 0)
        queries = load_vectors(q, i, count, q_stride_n, CHANNELS, BLOCK_CHANNELS)
        highest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
        highest_key = tl.zeros((BLOCK_QUERIES,), tl.int32)
        worth = tl.zeros((BLOCK_QUERIES,), tl.float32)  # of the row's weights
        worth_sum = tl.zeros((), tl.float32)
        value_sum = tl.zeros((BLOCK_CHANNELS,), tl.float32)
        for start in range(0, limit, BLOCK_KEYS):
            j = start + tl.arange(0, BLOCK_KEYS)
            keys = load_vectors(k, j, count, k_stride_n, CHANNELS, BLOCK_CHANNELS)
            dots = products(queries, keys)
            scores = dots * (scale * LOG2_E) + key_terms(bias, first, j, j < count, BIAS)[None, :]
            if POLICY:
                best = tl.max(scores, 1)
                best_key = tl.min(tl.where(scores == best[:, None], j[None, :], count), 1)
                highest_key = tl.where(best > highest, best_key, highest_key)
                highest = tl.maximum(best, highest)
                values = load_vectors(v, j, count, v_stride_n, CHANNELS, BLOCK_CHANNELS)
                value_sum += tl.sum(values.to(tl.float32), 0)
            if IMPORTANCE != "":
                seen = tl.exp2(scores - own_level[:, None])
                if POLICY:
                    kept = load_tokens(policy, first, j, count)
                    seen = tl.where(i[:, None] == j[None, :], seen, seen * kept[None, :])
                    seen += EPS / count.to(tl.float32)
                grad = load_tokens(grad_worth, first, j, count)
                worth += tl.sum(seen * grad[None, :], 1)
                worth_sum += tl.sum(grad, 0)
        mean = tl.zeros((BLOCK_QUERIES,), tl.float32)
        if IMPORTANCE != "":
            share = tl.where(counts_query(i, count, IMPORTANCE), weight_share(heads, count, IMPORTANCE), 0.0)
            total += worth * inverse * share
            mean += worth_sum * share
        if POLICY:
            mean = (mean + tl.sum(grads * value_sum[None, :], 1)) / count.to(tl.float32)
            store_rows(top + at, highest_key, i, count, heads)
            store_rows(shift + at, (total - mean) * inverse * EPS, i, count, heads)
    start, stride = rows_apart(image, head, first, heads, padded, PACKED)
    if not POLICY:  # with one, the sum may be so small that it has more digits than the two together would
        own_level += tl.log2(load_rows(row_sum + at, i, count, heads, 1.0))
    written = count if PACKED else padded
    store_rows(level + start, own_level, i, written, stride)
    store_rows(delta + start, total, i, written, stride)
