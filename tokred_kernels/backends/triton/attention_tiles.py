# SPDX-License-Identifier: MIT
"""Functions that the attention kernels share: addresses of rows, loads and stores of tiles, and terms of scores."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.native.token_attention import packed_strides
from tokred_kernels.backends.reference.token_attention import POLICY_EPS
from tokred_kernels.backends.triton.common import INTERPRETED, multiply_add, narrow
from tokred_kernels.backends.triton.configs_attention import AttentionConfig

# Exponentials are of base 2, which GPUs have an instruction for; scores are scaled to match.
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
EPS = tl.constexpr(POLICY_EPS)


def head_strides(tensor: Tensor, starts: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of image, head and token of a tensor (B, H, N, d), or packed (T, H, d)."""
    return packed_strides(tensor) if starts is not None else (tensor.stride(0), tensor.stride(1), tensor.stride(2))


def sizes(q: Tensor, starts: Tensor | None, longest: int) -> tuple[int, int, int, int]:
    """Return the numbers of images, heads, tokens (of the longest packed image) and channels of a head."""
    if starts is not None:
        return starts.shape[0] - 1, q.shape[1], longest, q.shape[2]
    images, heads, tokens, channels = q.shape
    return images, heads, tokens, channels


def shares(images: int, heads: int, tokens: int, block: int) -> tuple[tuple[int], int]:
    """Return the grid of a kernel with one program for `block` tokens of a head, and the blocks of an image."""
    blocks = triton.cdiv(tokens, block)
    return (images * heads * blocks,), blocks


def is_whole(config: AttentionConfig, tokens: int, policy: Tensor | None, starts: Tensor | None) -> bool:
    """Return whether kernels read whole blocks of keys; see `key_block`.

    They cannot with a policy, since keys without weight count then. On AMD's GPUs that program spills registers.
    """
    return torch.version.hip is None and policy is None and starts is None and tokens >= config.block_keys


def launch_options(config: AttentionConfig, channels: int) -> dict[str, int]:
    """Return the launch options that all kernels with tiles of scores have in common."""
    return {
        "CHANNELS": channels,
        "BLOCK_CHANNELS": config.block_channels,
        "BLOCK_QUERIES": config.block_queries,
        "BLOCK_KEYS": config.block_keys,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


@triton.jit
def place(heads, blocks):
    """Return the image, head and block of this program; programs of one head are neighbours and share cache lines."""
    program = tl.program_id(0)
    return (program // blocks // heads).to(tl.int64), program // blocks % heads, program % blocks


@triton.jit
def rows_place(starts, heads, tokens, blocks, PACKED: tl.constexpr):
    """Return the results of `place`, then the first row of the image and its number of rows."""
    image, head, block = place(heads, blocks)
    if PACKED:
        first = tl.load(starts + image)
        count = tl.load(starts + image + 1) - first
        first = first.to(tl.int64)
    else:
        first = image * tokens
        count = tokens
    return image, head, block, first, count


@triton.jit
def head_start(vectors, image, head, stride_b, stride_h, stride_n=0, first=0, PACKED: tl.constexpr = False):
    """Return the address of the vectors of one head of one image; if PACKED, the image starts at row `first`."""
    vectors += head.to(tl.int64) * stride_h
    return vectors + first * stride_n if PACKED else vectors + image * stride_b


@triton.jit
def tile_place(vectors, i, count, stride_n, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Return the addresses of a (BLOCK, BLOCK_CHANNELS) tile of the vectors of tokens i, and its mask."""
    c = tl.arange(0, BLOCK_CHANNELS)
    at = vectors + i.to(tl.int64)[:, None] * stride_n + c[None, :]
    mask = (i < count)[:, None]
    if CHANNELS < BLOCK_CHANNELS:
        mask = mask & (c < CHANNELS)[None, :]
    return at, mask


@triton.jit
def load_vectors(vectors, i, count, stride_n, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Load a (BLOCK, BLOCK_CHANNELS) tile of the vectors of tokens i; 0 beyond `count` and beyond CHANNELS."""
    at, mask = tile_place(vectors, i, count, stride_n, CHANNELS, BLOCK_CHANNELS)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_vectors(vectors, tile, i, count, stride_n, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Store the tile that `load_vectors` loads; float32 is rounded to the dtype of `vectors`."""
    at, mask = tile_place(vectors, i, count, stride_n, CHANNELS, BLOCK_CHANNELS)
    tl.store(at, narrow(tile, vectors.dtype.element_ty), mask=mask)


@triton.jit
def key_block(start, count, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Return the first key to read for the block at `start`, the keys, and a mask of the keys that count.

    If WHOLE, there are at least BLOCK keys, and the last block is moved back so that it ends with the last key. Its
    first keys are in the block before, and do not count again. So no load needs a mask. (The kernel for the gradient of
    the queries cannot use this: it would spill registers.)
    """
    begin = tl.minimum(start, count - BLOCK) if WHOLE else start
    j = begin + tl.arange(0, BLOCK)
    return begin, j, (j >= start if WHOLE else j < count)


@triton.jit
def load_block(
    vectors,
    begin,
    j,
    count,
    stride_n,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Load the vectors of the keys of a `key_block`, like `load_vectors`; if WHOLE, from one base address."""
    if not WHOLE:
        return load_vectors(vectors, j, count, stride_n, CHANNELS, BLOCK_CHANNELS)
    c = tl.arange(0, BLOCK_CHANNELS)
    inside = tl.arange(0, j.shape[0])[:, None] * stride_n + c[None, :]
    at = vectors + begin.to(tl.int64) * stride_n + inside
    if CHANNELS < BLOCK_CHANNELS:
        return tl.load(at, mask=(c < CHANNELS)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def key_terms(bias, first, j, present, BIAS: tl.constexpr, WHOLE: tl.constexpr = False):
    """Return the terms to add to the scores of keys j, in base 2: -infinity for keys not `present`; see `key_block`."""
    if BIAS and WHOLE:  # every key is in memory, so the load needs no mask and is cheaper
        term = tl.where(present, tl.load(bias + first + j) * LOG2_E, float("-inf"))
    elif BIAS:
        term = tl.load(bias + first + j, mask=present, other=float("-inf")) * LOG2_E
    else:
        term = tl.where(present, 0.0, float("-inf"))
    return term


@triton.jit
def load_tokens(values, first, j, count):
    """Load the entries of tokens j from a tensor (rows); 0 beyond the image's `count`."""
    return tl.load(values + first + j, mask=j < count, other=0.0)


@triton.jit
def load_rows(values, i, count, heads, other):
    """Load the entries of tokens i of a head from a tensor (rows, H)."""
    return tl.load(values + i.to(tl.int64) * heads, mask=i < count, other=other)


@triton.jit
def store_rows(values, row, i, count, heads):
    """Store the entries that `load_rows` loads."""
    tl.store(values + i.to(tl.int64) * heads, row, mask=i < count)


@triton.jit
def rows_apart(image, head, first, heads, padded, PACKED: tl.constexpr):
    """Return the start and the stride of the entries of an image's rows.

    The entries of a head are contiguous and padded to `padded` rows; if images are PACKED, those of a row are.
    """
    if PACKED:
        start, stride = first * heads + head, heads
    else:
        start, stride = (image * heads + head) * padded, 1
    return start, stride


@triton.jit
def load_padded(values, i, count, stride, other, PACKED: tl.constexpr):
    """Load the entries of tokens i of a head; those beyond the image's `count` must be in memory."""
    if PACKED:
        return load_rows(values, i, count, stride, other)
    return tl.load(values + i)


@triton.jit
def row_softmax(row_max, row_sum, i, count, heads):
    """Return `level` and `inverse` of weights exp2(score - level) * inverse, scores in base 2; 0 beyond `count`."""
    level = load_rows(row_max, i, count, heads, float("inf")) * LOG2_E
    return level, 1.0 / load_rows(row_sum, i, count, heads, 1.0)


@triton.jit
def first_highest(scores, best, j, highest, highest_key):
    """Return the first key of highest score, among keys j with the maximum `best` and earlier keys with `highest`."""
    best_key = tl.min(tl.where(scores == best[:, None], j[None, :], 0x7FFFFFFF), 1)
    return tl.where(best > highest, best_key, highest_key)


@triton.jit
def finite_level(highest):
    """Return the value to subtract from the scores of rows: the highest score, or 0 if no key has a score yet."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def counts_query(i, count, IMPORTANCE: tl.constexpr):
    """Return whether the weights of queries i count for the importance."""
    if IMPORTANCE == "class":
        counts = i == 0
    elif IMPORTANCE == "last":
        counts = i == count - 1
    else:
        counts = i >= 0
    return counts


@triton.jit
def weight_share(heads, count, IMPORTANCE: tl.constexpr):
    """Return the factor of a weight in the importance of its key."""
    number = heads * count if IMPORTANCE == "mean" else heads
    return 1.0 / number.to(tl.float32)


@triton.jit
def products(a, b):
    """Return a b^T in float32; float32 operands are not rounded to TF32."""
    return multiply_add(a, b, tl.zeros((a.shape[0], b.shape[0]), tl.float32))


@triton.jit
def multiply(a, b, total):
    """total + a b, float32, of float32 without TF32. See `multiply_add` for the interpreter's bfloat16."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
