# SPDX-License-Identifier: MIT
"""The kernels that the gradients of gather and scatter share: one over blocks of queries, one over blocks of keys.

The gradient of a weight is a product of a vector of the query and a vector of the key: for the gather, the gradient of
its result and v; for the scatter, v and the gradient of its result.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.triton.attention_tiles import (
    LOG2_E,
    head_start,
    launch_options,
    load_rows,
    load_vectors,
    multiply,
    place,
    products,
    shares,
    store_rows,
    store_vectors,
)
from tokred_kernels.backends.triton.common import narrow
from tokred_kernels.backends.triton.configs_attention import architecture_of, lookup_config, lookup_splits
from tokred_kernels.backends.triton.lookup_tiles import (
    combine,
    few_place,
    load_level,
    parts_of,
    split_at,
    vectors_at,
    weight_factor,
)


def differentiate_queries(
    q: Tensor,
    k: Tensor,
    few: Tensor,
    many: Tensor,
    lse: Tensor,
    scale: float,
    results: list[Tensor],
    of_gather: tuple[Tensor, Tensor | None, Tensor] | None = None,
) -> None:
    """Write the sums over keys: the gradient of q, and for the scatter also those of v and lse.

    `of_gather` is the output, the gradient of lse, and where to write what each query's gradients of weights are taken
    from, which `differentiate_keys` needs.
    """
    images, heads, compressed, channels = q.shape
    if images * heads == 0:
        return
    tokens = k.shape[2]
    kernel = "scatter_queries" if of_gather is None else "gather_queries"
    config = lookup_config(kernel, compressed, channels, q.dtype, architecture_of(q))
    blocks = triton.cdiv(compressed, config.block_queries)
    splits, share = lookup_splits(images * heads * blocks, tokens, config.block_keys, config.enough)
    parts = parts_of(splits, *results)
    out, grad_lse, offset = of_gather or (None, None, None)
    lookup_queries_kernel[(images * heads * blocks * splits,)](
        *(q, k, few, many, lse, out, grad_lse, offset),
        *(parts if of_gather is None else (*parts, None, None)),
        *(number for t in (q, k, few, many) for number in t.stride()[:3]),
        *(images, heads, compressed, tokens, blocks, splits, share, scale),
        GATHER=of_gather is not None,
        LSE=grad_lse is not None,
        **launch_options(config, channels),
    )
    if splits > 1:
        combine(parts, results, softmax=False)


def differentiate_keys(
    q: Tensor,
    k: Tensor,
    few: Tensor,
    many: Tensor,
    lse: Tensor,
    scale: float,
    grad_k: Tensor,
    of_gather: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write the gradient of k, and for the gather also that of v, from the results of `differentiate_queries`."""
    images, heads, compressed, channels = q.shape
    tokens = k.shape[2]
    kernel = "scatter_keys" if of_gather is None else "gather_keys"
    config = lookup_config(kernel, compressed, channels, q.dtype, architecture_of(q))
    grid, blocks = shares(images, heads, tokens, config.block_keys)
    offset, grad_v = of_gather or (None, None)
    if grid[0]:
        lookup_keys_kernel[grid](
            *(q, k, few, many, lse, offset, grad_k, grad_v),
            *(number for t in (q, k, few, many) for number in t.stride()[:3]),
            *(heads, compressed, tokens, blocks, scale),
            GATHER=of_gather is not None,
            **launch_options(config, channels),
        )


@triton.jit(do_not_specialize=["images", "heads", "compressed", "tokens", "blocks", "splits", "share"])
def lookup_queries_kernel(
    q,  # (B, H, M, d)
    k,  # (B, H, N, d)
    few,  # (B, H, M, d)
    many,  # (B, H, N, d)
    lse,  # (B, H, M)
    out,  # (B, M, H, d), of the gather, if GATHER
    grad_lse,  # (B, H, M), if LSE
    offset,  # out: (B, H, M), grad_lse - few . out, if GATHER
    grad_q,  # out: (splits, B, M, H, d)
    grad_v,  # out: (splits, B, M, H, d), if not GATHER
    to_lse,  # out: (splits, B, H, M), if not GATHER
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    few_stride_b,
    few_stride_h,
    few_stride_n,
    many_stride_b,
    many_stride_h,
    many_stride_n,
    images,
    heads,
    compressed,
    tokens,
    blocks,
    splits,
    share,  # of the keys, for a split
    scale,
    GATHER: tl.constexpr,
    LSE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A program takes BLOCK_QUERIES queries of one head past the keys of a split; csrc/common/args.h has the equations.

    The last split's keys beyond the last one have a score of -infinity, so that they add nothing.
    """
    image, head, block, split = few_place(heads, blocks, splits)
    q = head_start(q, image, head, q_stride_b, q_stride_h)
    k = head_start(k, image, head, k_stride_b, k_stride_h)
    few = head_start(few, image, head, few_stride_b, few_stride_h)
    many = head_start(many, image, head, many_stride_b, many_stride_h)
    row = (image * heads + head) * compressed
    first = vectors_at(image, head, heads, compressed, CHANNELS)
    stride = heads * CHANNELS
    factor = weight_factor(many.dtype.element_ty)
    i = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    queries = load_vectors(q, i, compressed, q_stride_n, CHANNELS, BLOCK_CHANNELS)
    fews = load_vectors(few, i, compressed, few_stride_n, CHANNELS, BLOCK_CHANNELS)
    level = load_level(lse + row, i, compressed)
    shift = tl.zeros((BLOCK_QUERIES,), tl.float32)
    if GATHER:
        outs = load_vectors(out + first, i, compressed, stride, CHANNELS, BLOCK_CHANNELS)
        shift -= tl.sum(fews.to(tl.float32) * outs.to(tl.float32), 1)
        if LSE:
            shift += load_rows(grad_lse + row, i, compressed, 1, 0.0)
        tl.store(offset + row + i, shift, mask=(i < compressed) & (split == 0))

    to_queries = tl.zeros((BLOCK_QUERIES, BLOCK_CHANNELS), tl.float32)
    to_values = tl.zeros((BLOCK_QUERIES, BLOCK_CHANNELS), tl.float32)
    moves = tl.zeros((BLOCK_QUERIES,), tl.float32)
    for start in range(split * share, tl.minimum((split + 1) * share, tokens), BLOCK_KEYS):
        j = start + tl.arange(0, BLOCK_KEYS)
        keys = load_vectors(k, j, tokens, k_stride_n, CHANNELS, BLOCK_CHANNELS)
        dots = products(queries, keys)
        scores = tl.where((j < tokens)[None, :], dots * (scale * LOG2_E), float("-inf"))
        weights = tl.exp2(scores - level[:, None])
        manys = load_vectors(many, j, tokens, many_stride_n, CHANNELS, BLOCK_CHANNELS)
        reached = products(fews, manys)
        moved = weights * (reached + shift[:, None])
        to_queries = multiply(narrow(moved, keys.dtype), keys, to_queries)
        if not GATHER:
            moves += tl.sum(moved, 1)
            to_values = multiply(narrow(weights * factor, manys.dtype), manys, to_values)

    at = split_at(split, images, heads, compressed)
    grad_q += at * CHANNELS + first
    store_vectors(grad_q, to_queries * scale, i, compressed, stride, CHANNELS, BLOCK_CHANNELS)
    if not GATHER:
        grad_v += at * CHANNELS + first
        store_vectors(grad_v, to_values * (1 / factor), i, compressed, stride, CHANNELS, BLOCK_CHANNELS)
        store_rows(to_lse + at + row, -moves, i, compressed, 1)


@triton.jit(do_not_specialize=["heads", "compressed", "tokens", "blocks"])
def lookup_keys_kernel(
    q,  # (B, H, M, d)
    k,  # (B, H, N, d)
    few,  # (B, H, M, d)
    many,  # (B, H, N, d)
    lse,  # (B, H, M)
    offset,  # (B, H, M), if GATHER
    grad_k,  # out: (B, N, H, d)
    grad_v,  # out: (B, N, H, d), if GATHER
    q_stride_b,
    q_stride_h,
    q_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    few_stride_b,
    few_stride_h,
    few_stride_n,
    many_stride_b,
    many_stride_h,
    many_stride_n,
    heads,
    compressed,
    tokens,
    blocks,
    scale,
    GATHER: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A program takes BLOCK_KEYS keys of one head past all queries: tiles are of keys x queries.

    Queries beyond the last one have an lse of infinity and vectors of 0, so that they add nothing.
    """
    image, head, block = place(heads, blocks)
    q = head_start(q, image, head, q_stride_b, q_stride_h)
    k = head_start(k, image, head, k_stride_b, k_stride_h)
    few = head_start(few, image, head, few_stride_b, few_stride_h)
    many = head_start(many, image, head, many_stride_b, many_stride_h)
    row = (image * heads + head) * compressed
    factor = weight_factor(few.dtype.element_ty)
    j = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    keys = load_vectors(k, j, tokens, k_stride_n, CHANNELS, BLOCK_CHANNELS)
    manys = load_vectors(many, j, tokens, many_stride_n, CHANNELS, BLOCK_CHANNELS)

    to_keys = tl.zeros((BLOCK_KEYS, BLOCK_CHANNELS), tl.float32)
    to_values = tl.zeros((BLOCK_KEYS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, compressed, BLOCK_QUERIES):
        i = start + tl.arange(0, BLOCK_QUERIES)
        queries = load_vectors(q, i, compressed, q_stride_n, CHANNELS, BLOCK_CHANNELS)
        dots = products(keys, queries)
        weights = tl.exp2(dots * (scale * LOG2_E) - load_level(lse + row, i, compressed)[None, :])
        fews = load_vectors(few, i, compressed, few_stride_n, CHANNELS, BLOCK_CHANNELS)
        reached = products(manys, fews)
        if GATHER:
            reached += load_rows(offset + row, i, compressed, 1, 0.0)[None, :]
            to_values = multiply(narrow(weights * factor, fews.dtype), fews, to_values)
        to_keys = multiply(narrow(weights * reached, queries.dtype), queries, to_keys)

    first = vectors_at(image, head, heads, tokens, CHANNELS)
    stride = heads * CHANNELS
    store_vectors(grad_k + first, to_keys * scale, j, tokens, stride, CHANNELS, BLOCK_CHANNELS)
    if GATHER:
        store_vectors(grad_v + first, to_values * (1 / factor), j, tokens, stride, CHANNELS, BLOCK_CHANNELS)
