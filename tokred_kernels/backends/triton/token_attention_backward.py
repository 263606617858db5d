# SPDX-License-Identifier: MIT
"""The gradients of token attention in Triton: terms of rows, then the gradient of queries, then of keys and values.

Each kernel computes the scores again, possibly with another order of summation. So the relative error of a weight is
the rounding of its score, about |score| * 2^-24, as in FlashAttention. Without a policy no weight exceeds 1, and no
gradient is larger than its terms. With a policy, gradients are divided by a sum that can be as small as eps. There, the
exponential of the highest score is 1 by definition, and D_i and Z_i come from one kernel; see `rows_kernel`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.triton.attention_rows import rows_kernel
from tokred_kernels.backends.triton.attention_tiles import (
    EPS,
    LOG2_E,
    counts_query,
    head_start,
    head_strides,
    key_terms,
    launch_options,
    load_padded,
    load_tokens,
    load_vectors,
    multiply,
    products,
    rows_apart,
    rows_place,
    shares,
    sizes,
    store_rows,
    store_vectors,
    weight_share,
)
from tokred_kernels.backends.triton.common import narrow, on_device
from tokred_kernels.backends.triton.configs_attention import (
    AttentionConfig,
    architecture_of,
    keys_config,
    queries_config,
    row_terms_config,
)


def token_attention_backward(
    grad_out: Tensor,
    grad_importance: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    policy: Tensor | None,
    starts: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    longest: int,
    scale: float,
    importance: str,
    need_bias: bool,
    need_policy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `ops.token_attention`: gradients in the layout of `out`, and of bias and policy, empty if not needed.

    `grad_out` lies as `out` does: (B, N, H, d), or (T, H, d).
    """
    q, k, v, grad_out = (inner_dense(t) for t in (q, k, v, grad_out))
    if grad_importance is not None:
        grad_importance = grad_importance.contiguous()
    grad_q, grad_k, grad_v = (torch.empty_like(out) for _ in range(3))
    of_heads = [torch.empty_like(row_max) if need else None for need in (need_bias, need_policy)]
    images, heads, tokens, channels = sizes(q, starts, longest)
    of = (channels, q.dtype, policy is not None, architecture_of(q))
    rows, by_query, by_key = row_terms_config(*of), queries_config(*of), keys_config(*of)
    # Padded to whole blocks, so that loads need no mask.
    block = max(config.block_queries for config in (rows, by_query, by_key))
    padded = triton.cdiv(tokens, block) * block
    shape = row_max.shape if starts is not None else (images, heads, padded)
    delta, level = (row_max.new_empty(shape) for _ in range(2))
    top = shift = inverse_sum = None
    if policy is not None:
        shift, inverse_sum = (row_max.new_empty(shape) for _ in range(2))
        top = row_max.new_empty(shape, dtype=torch.int32)
    row_terms = (delta, level, top, shift, inverse_sum)
    inputs = (q, k, v, grad_out, bias, policy, starts, grad_importance)
    strides = [number for t in (q, k, v) for number in head_strides(t, starts)]
    strides += head_strides(grad_out if starts is not None else grad_out.transpose(1, 2), starts)
    modes = {
        "BIAS": bias is not None,
        "POLICY": policy is not None,
        "PACKED": starts is not None,
        "IMPORTANCE": importance if grad_importance is not None else "",
    }

    def launch(
        kernel: Any, config: AttentionConfig, share: tuple[int, int], *others: Tensor | None, **more: bool
    ) -> None:
        grid, blocks = shares(images, heads, *share)
        if grid[0]:
            kernel[grid](
                *(*inputs, *others, *strides, heads, tokens, blocks, padded, scale),
                **(modes | more),
                **launch_options(config, channels),
            )

    with on_device(q):
        of_rows = tokens if starts is not None else padded
        launch(rows_kernel, rows, (of_rows, rows.block_queries), row_max, row_sum, out, *row_terms)
        launch(queries_kernel, by_query, (tokens, by_query.block_queries), *row_terms, grad_q)
        outputs = (grad_k, grad_v, *of_heads)
        needs = {"NEED_BIAS": need_bias, "NEED_POLICY": need_policy}
        launch(keys_kernel, by_key, (tokens, by_key.block_keys), *row_terms, *outputs, **needs)
    # Heads are summed in one order, so the result does not depend on timing.
    sums = [row_max.new_empty(0) if t is None else t.sum(-1) for t in of_heads]
    return grad_q, grad_k, grad_v, sums[0], sums[1]


@triton.jit(do_not_specialize=["heads", "tokens", "blocks"])
def keys_kernel(
    q,  # (B, H, N, d), or, if PACKED, (T, H, d); k, v and grad_out likewise
    k,
    v,
    grad_out,
    bias,  # (rows), if BIAS
    policy,  # (rows), if POLICY
    starts,  # (B + 1), if PACKED
    grad_importance,  # (rows), if IMPORTANCE
    delta,  # (B, H, padded), or, if PACKED, (rows, H); this and the next four are from `rows_kernel`
    level,  # as delta
    top,  # as delta, if POLICY
    shift,  # as delta, if POLICY
    inverse_sum,  # as delta, if POLICY
    grad_k,  # out: (rows, H, d)
    grad_v,  # out: (rows, H, d)
    grad_bias,  # out: (rows, H), if NEED_BIAS
    grad_policy,  # out: (rows, H), if NEED_POLICY
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
    NEED_BIAS: tl.constexpr,
    NEED_POLICY: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A program takes BLOCK_KEYS keys of one head past all queries: tiles are of keys x queries.

    Queries beyond the last one have a highest score of infinity and vectors of 0, so that they add nothing.
    """
    image, head, block, first, count = rows_place(starts, heads, tokens, blocks, PACKED)
    if block * BLOCK_KEYS >= count:
        return
    q = head_start(q, image, head, q_stride_b, q_stride_h, q_stride_n, first, PACKED)
    k = head_start(k, image, head, k_stride_b, k_stride_h, k_stride_n, first, PACKED)
    v = head_start(v, image, head, v_stride_b, v_stride_h, v_stride_n, first, PACKED)
    grad_out = head_start(grad_out, image, head, g_stride_b, g_stride_h, g_stride_n, first, PACKED)
    at = first * heads + head
    row, stride_row = rows_apart(image, head, first, heads, padded, PACKED)
    j = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    keys = load_vectors(k, j, count, k_stride_n, CHANNELS, BLOCK_CHANNELS)
    values = load_vectors(v, j, count, v_stride_n, CHANNELS, BLOCK_CHANNELS)
    terms = key_terms(bias, first, j, j < count, BIAS)
    if POLICY:
        kept = load_tokens(policy, first, j, count)
    if IMPORTANCE != "":
        from_importance = load_tokens(grad_importance, first, j, count) * weight_share(heads, count, IMPORTANCE)

    to_keys = tl.zeros((BLOCK_KEYS, BLOCK_CHANNELS), tl.float32)
    to_values = tl.zeros((BLOCK_KEYS, BLOCK_CHANNELS), tl.float32)
    to_bias = tl.zeros((BLOCK_KEYS,), tl.float32)
    to_policy = tl.zeros((BLOCK_KEYS,), tl.float32)
    for start in range(0, count, BLOCK_QUERIES):
        i = start + tl.arange(0, BLOCK_QUERIES)
        queries = load_vectors(q, i, count, q_stride_n, CHANNELS, BLOCK_CHANNELS)
        levels = load_padded(level + row, i, count, stride_row, float("inf"), PACKED)
        mean = load_padded(delta + row, i, count, stride_row, 0.0, PACKED)
        dots = products(keys, queries)
        weights = tl.exp2(dots * (scale * LOG2_E) + terms[:, None] - levels[None, :])
        if POLICY:
            is_top = load_padded(top + row, i, count, stride_row, -1, PACKED)[None, :] == j[:, None]
            inverse = load_padded(inverse_sum + row, i, count, stride_row, 1.0, PACKED)
            # 1 by definition, however the score rounds in this kernel.
            weights = tl.where(is_top, 1.0, weights) * inverse[None, :]
        grads = load_vectors(grad_out, i, count, g_stride_n, CHANNELS, BLOCK_CHANNELS)
        reached = products(values, grads)
        if IMPORTANCE != "":
            reached += tl.where(counts_query(i, count, IMPORTANCE)[None, :], from_importance[:, None], 0.0)
        moved = weights * (reached - mean[None, :])
        if POLICY:
            own = i[None, :] == j[:, None]
            to_policy += tl.sum(tl.where(own, 0.0, moved), 1)
            moved = tl.where(own, moved, moved * kept[:, None])
            shifts = load_padded(shift + row, i, count, stride_row, 0.0, PACKED)
            moved -= tl.where(is_top, shifts[None, :], 0.0)
            weights = tl.where(own, weights, weights * kept[:, None])
            weights += (EPS / count.to(tl.float32)) * inverse[None, :]
        to_bias += tl.sum(moved, 1)
        to_values = multiply(narrow(weights, grads.dtype), grads, to_values)
        to_keys = multiply(narrow(moved, queries.dtype), queries, to_keys)

    stride = heads * CHANNELS
    store_vectors(grad_k + at * CHANNELS, to_keys * scale, j, count, stride, CHANNELS, BLOCK_CHANNELS)
    store_vectors(grad_v + at * CHANNELS, to_values, j, count, stride, CHANNELS, BLOCK_CHANNELS)
    if NEED_BIAS:
        store_rows(grad_bias + at, to_bias, j, count, heads)
    if NEED_POLICY:
        store_rows(grad_policy + at, to_policy, j, count, heads)


@triton.jit(do_not_specialize=["heads", "tokens", "blocks"])
def queries_kernel(
    q,  # (B, H, N, d), or, if PACKED, (T, H, d); k, v and grad_out likewise
    k,
    v,
    grad_out,
    bias,  # (rows), if BIAS
    policy,  # (rows), if POLICY
    starts,  # (B + 1), if PACKED
    grad_importance,  # (rows), if IMPORTANCE
    delta,  # (B, H, padded), or, if PACKED, (rows, H); this and the next four are from `rows_kernel`
    level,  # as delta
    top,  # as delta, if POLICY
    shift,  # as delta, if POLICY
    inverse_sum,  # as delta, if POLICY
    grad_q,  # out: (rows, H, d)
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
    """A program takes BLOCK_QUERIES queries of one head past all keys."""
    image, head, block, first, count = rows_place(starts, heads, tokens, blocks, PACKED)
    if block * BLOCK_QUERIES >= count:
        return
    q = head_start(q, image, head, q_stride_b, q_stride_h, q_stride_n, first, PACKED)
    k = head_start(k, image, head, k_stride_b, k_stride_h, k_stride_n, first, PACKED)
    v = head_start(v, image, head, v_stride_b, v_stride_h, v_stride_n, first, PACKED)
    grad_out = head_start(grad_out, image, head, g_stride_b, g_stride_h, g_stride_n, first, PACKED)
    at = first * heads + head
    row, stride_row = rows_apart(image, head, first, heads, padded, PACKED)
    i = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    queries = load_vectors(q, i, count, q_stride_n, CHANNELS, BLOCK_CHANNELS)
    grads = load_vectors(grad_out, i, count, g_stride_n, CHANNELS, BLOCK_CHANNELS)
    levels = load_padded(level + row, i, count, stride_row, float("inf"), PACKED)
    mean = load_padded(delta + row, i, count, stride_row, 0.0, PACKED)
    if POLICY:
        inverse = load_padded(inverse_sum + row, i, count, stride_row, 1.0, PACKED)
        highest_key = load_padded(top + row, i, count, stride_row, -1, PACKED)
        shifts = load_padded(shift + row, i, count, stride_row, 0.0, PACKED)
    if IMPORTANCE != "":
        share = tl.where(counts_query(i, count, IMPORTANCE), weight_share(heads, count, IMPORTANCE), 0.0)

    to_queries = tl.zeros((BLOCK_QUERIES, BLOCK_CHANNELS), tl.float32)
    for start in range(0, count, BLOCK_KEYS):
        j = start + tl.arange(0, BLOCK_KEYS)
        keys = load_vectors(k, j, count, k_stride_n, CHANNELS, BLOCK_CHANNELS)
        terms = key_terms(bias, first, j, j < count, BIAS)
        dots = products(queries, keys)
        weights = tl.exp2(dots * (scale * LOG2_E) + terms[None, :] - levels[:, None])
        if POLICY:
            is_top = highest_key[:, None] == j[None, :]
            weights = tl.where(is_top, 1.0, weights) * inverse[:, None]
        values = load_vectors(v, j, count, v_stride_n, CHANNELS, BLOCK_CHANNELS)
        reached = products(grads, values)
        if IMPORTANCE != "":
            from_importance = load_tokens(grad_importance, first, j, count)
            reached += share[:, None] * from_importance[None, :]
        moved = weights * (reached - mean[:, None])
        if POLICY:
            kept = load_tokens(policy, first, j, count)
            moved = tl.where(i[:, None] == j[None, :], moved, moved * kept[None, :])
            moved -= tl.where(is_top, shifts[:, None], 0.0)
        to_queries = multiply(narrow(moved, keys.dtype), keys, to_queries)
    store_vectors(grad_q + at * CHANNELS, to_queries * scale, i, count, heads * CHANNELS, CHANNELS, BLOCK_CHANNELS)
