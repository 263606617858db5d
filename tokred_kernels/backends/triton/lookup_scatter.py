# SPDX-License-Identifier: MIT
"""Lookup attention's scatter in Triton: each program takes a block of keys and all queries, and recomputes weights."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.backends.triton.attention_tiles import (
    LOG2_E,
    head_start,
    launch_options,
    load_vectors,
    multiply,
    place,
    products,
    shares,
    store_vectors,
)
from tokred_kernels.backends.triton.common import narrow, on_device
from tokred_kernels.backends.triton.configs_attention import architecture_of, lookup_config
from tokred_kernels.backends.triton.lookup_tiles import (
    empty_heads_last,
    load_level,
    vectors_at,
    weight_factor,
)


def lookup_scatter(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float) -> Tensor:
    """See `ops.lookup_scatter`: (B, N, H, d)."""
    q, k, v = (inner_dense(t) for t in (q, k, v))
    lse = lse.contiguous()
    images, heads, compressed, channels = q.shape
    tokens = k.shape[2]
    out = empty_heads_last(k)
    config = lookup_config("scatter", compressed, channels, q.dtype, architecture_of(q))
    grid, blocks = shares(images, heads, tokens, config.block_keys)
    with on_device(q):
        if grid[0]:
            scatter_kernel[grid](
                *(q, k, v, lse, out),
                *(number for t in (q, k, v) for number in t.stride()[:3]),
                *(heads, compressed, tokens, blocks, scale),
                **launch_options(config, channels),
            )
    return out


@triton.jit(do_not_specialize=["heads", "compressed", "tokens", "blocks"])
def scatter_kernel(
    q,  # (B, H, M, d)
    k,  # (B, H, N, d)
    v,  # (B, H, M, d)
    lse,  # (B, H, M)
    out,  # out: (B, N, H, d)
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
    compressed,
    tokens,
    blocks,
    scale,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """A program takes BLOCK_KEYS keys of one head past all queries: tiles are of keys x queries."""
    image, head, block = place(heads, blocks)
    q = head_start(q, image, head, q_stride_b, q_stride_h)
    k = head_start(k, image, head, k_stride_b, k_stride_h)
    v = head_start(v, image, head, v_stride_b, v_stride_h)
    lse += (image * heads + head) * compressed
    factor = weight_factor(v.dtype.element_ty)
    j = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    keys = load_vectors(k, j, tokens, k_stride_n, CHANNELS, BLOCK_CHANNELS)

    mixed = tl.zeros((BLOCK_KEYS, BLOCK_CHANNELS), tl.float32)
    for start in range(0, compressed, BLOCK_QUERIES):
        i = start + tl.arange(0, BLOCK_QUERIES)
        queries = load_vectors(q, i, compressed, q_stride_n, CHANNELS, BLOCK_CHANNELS)
        dots = products(keys, queries)
        weights = tl.exp2(dots * (scale * LOG2_E) - load_level(lse, i, compressed)[None, :])
        values = load_vectors(v, i, compressed, v_stride_n, CHANNELS, BLOCK_CHANNELS)
        mixed = multiply(narrow(weights * factor, values.dtype), values, mixed)
    out += vectors_at(image, head, heads, tokens, CHANNELS)
    store_vectors(out, mixed * (1 / factor), j, tokens, heads * CHANNELS, CHANNELS, BLOCK_CHANNELS)
