# SPDX-License-Identifier: MIT
"""Functions that the kernels of lookup attention share: splits of many tokens over programs, and the sum of splits.

The program of a split writes its results in float32, as if there were no other tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.layout import heads_last
from tokred_kernels.backends.triton.attention_tiles import (
    LN_2,
    LOG2_E,
    load_rows,
    load_vectors,
    place,
    store_rows,
    store_vectors,
)
from tokred_kernels.backends.triton.configs_attention import combine_config

# Weights are scaled by this before they are rounded to float16, which has few digits for weights of many tokens.
HALF_RANGE = tl.constexpr(2.0**8)


def empty_heads_last(tensor: Tensor) -> Tensor:
    """Return an empty (B, N, H, d) tensor for a (B, H, N, d) one: the memory layout of results."""
    return tensor.new_empty(heads_last(tensor))


def parts_of(splits: int, *results: Tensor) -> list[Tensor]:
    """Return the tensors that splits write: (splits, ...) float32, or the results if there is only one split."""
    if splits == 1:
        return list(results)
    return [result.new_empty((splits, *result.shape), dtype=torch.float32) for result in results]


def combine(parts: list[Tensor], results: list[Tensor], *, softmax: bool) -> None:
    """Add up the partial results of splits, in order.

    If `softmax`, the parts and results are vectors (B, M, H, d) and log-sum-exps (B, H, M). Otherwise they are vectors,
    or vectors, more vectors and rows (B, H, M).
    """
    more = not softmax and len(parts) > 1
    vectors, out = parts[0], results[0]
    images, compressed, heads, channels = out.shape
    config = combine_config(channels)
    blocks = triton.cdiv(compressed, config.block_rows)
    combine_kernel[(images * heads * blocks,)](
        *(vectors, parts[1] if more else None, parts[-1] if softmax or more else None),
        *(out, results[1] if more else None, results[-1] if softmax or more else None),
        *(images, heads, compressed, blocks, vectors.shape[0]),
        SOFTMAX=softmax,
        MORE=more,
        CHANNELS=channels,
        BLOCK_CHANNELS=config.block_channels,
        BLOCK_ROWS=config.block_rows,
        UNROLL=config.unroll,
        num_warps=config.num_warps,
    )


@triton.jit
def few_place(heads, blocks, splits):
    """The image, head, block of compressed tokens and split of this program: blocks of a split share what they read."""
    image, head, rest = place(heads, blocks * splits)
    return image, head, rest % blocks, rest // blocks


@triton.jit
def vectors_at(image, head, heads, tokens, CHANNELS: tl.constexpr):
    """Return the offset of the vectors of one head of one image in (B, N, H, d)."""
    return (image * tokens * heads + head) * CHANNELS


@triton.jit
def split_at(split, images, heads, compressed):
    """Return the offset of a split's values for each query of each head."""
    return split.to(tl.int64) * images * heads * compressed


@triton.jit
def weight_factor(dtype: tl.constexpr):
    """Return the factor of weights before they are rounded to `dtype`."""
    return HALF_RANGE if dtype == tl.float16 else 1.0


@triton.jit
def load_level(lse, i, count):
    """Return the values to subtract from the scores of queries i, in base 2; infinity beyond `count`."""
    return load_rows(lse, i, count, 1, float("inf")) * LOG2_E


@triton.jit(do_not_specialize=["images", "heads", "compressed", "blocks", "splits"])
def combine_kernel(
    parts,  # (splits, B, M, H, d)
    more_parts,  # (splits, B, M, H, d), if MORE
    row_parts,  # (splits, B, H, M), if SOFTMAX or MORE
    out,  # out: (B, M, H, d)
    more_out,  # out: (B, M, H, d), if MORE
    row_out,  # out: (B, H, M), if SOFTMAX or MORE
    images,
    heads,
    compressed,
    blocks,
    splits,
    SOFTMAX: tl.constexpr,
    MORE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """A program adds up BLOCK_ROWS rows of one head, split by split: no order depends on timing.

    If SOFTMAX, a part counts as its sum of exponentials, whose logarithm is in its row.
    """
    image, head, block = place(heads, blocks)
    i = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    stride = heads * CHANNELS
    first = vectors_at(image, head, heads, compressed, CHANNELS)
    row = (image * heads + head) * compressed
    highest = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_ROWS,), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    more_total = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    for number in tl.range(splits, loop_unroll_factor=UNROLL):
        at = split_at(number + tl.zeros((), tl.int32), images, heads, compressed)
        part = load_vectors(parts + first + at * CHANNELS, i, compressed, stride, CHANNELS, BLOCK_CHANNELS)
        if SOFTMAX:
            level = load_rows(row_parts + row + at, i, compressed, 1, 0.0) * LOG2_E
            higher = tl.maximum(highest, level)
            shrink = tl.exp2(highest - higher)
            counts = tl.exp2(level - higher)
            highest = higher
            row_sum = row_sum * shrink + counts
            total = total * shrink[:, None] + part * counts[:, None]
        else:
            total += part
        if MORE:
            others = more_parts + first + at * CHANNELS
            more_total += load_vectors(others, i, compressed, stride, CHANNELS, BLOCK_CHANNELS)
            row_sum += load_rows(row_parts + row + at, i, compressed, 1, 0.0)
    if SOFTMAX:
        total /= row_sum[:, None]
        row_sum = (highest + tl.log2(row_sum)) * LN_2
    store_vectors(out + first, total, i, compressed, stride, CHANNELS, BLOCK_CHANNELS)
    if MORE:
        store_vectors(more_out + first, more_total, i, compressed, stride, CHANNELS, BLOCK_CHANNELS)
    if SOFTMAX or MORE:
        store_rows(row_out + row, row_sum, i, compressed, 1)
