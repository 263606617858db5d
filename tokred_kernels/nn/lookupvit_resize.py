# SPDX-License-Identifier: MIT
"""Resize a grid of tokens linearly, in any number of dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokred_kernels.dtypes import accumulator_of


def resize_tokens(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Resize tokens (B, N, C) of the grid `before`, in row order, to (B, M, C) of the grid `after`.

    The interpolation is linear in each dimension, with antialiasing: for a smaller grid, the triangle filter is wider
    by the same factor, so that every input token contributes. Without it, 5 x 5 tokens of 24 x 24 would use only 100 of
    576. In two dimensions it equals torch's `interpolate(mode="bilinear", antialias=True)`, which does not support
    three dimensions, and whose backward uses atomics on a GPU. Here it is a product of small matrices. Equal grids
    return x.
    """
    sizes = list(before)
    dtype = x.dtype
    for axis, length in enumerate(after):
        if sizes[axis] == length:
            continue
        outer, inner = x.shape[0], x.shape[-1]
        for size in sizes[:axis]:
            outer *= size
        for size in sizes[axis + 1 :]:
            inner *= size
        weights = _weights(sizes[axis], length, x).expand(outer, -1, -1)
        resized = torch.bmm(weights, x.reshape(outer, sizes[axis], inner))
        sizes[axis] = length
        x = resized.reshape(x.shape[0], math.prod(sizes), x.shape[-1])
    return x.to(dtype)  # autocast would round the start of the residual stream


def resize_flops(channels: int, before: Sequence[int], after: Sequence[int]) -> int:
    """Return the FLOPs of `resize_tokens` for one image."""
    sizes, flops = list(before), 0
    for axis, length in enumerate(after):
        if sizes[axis] == length:
            continue
        pairs = length
        for size in sizes:
            pairs *= size
        flops += 2 * pairs * channels
        sizes[axis] = length
    return flops


def _weights(before: int, after: int, like: Tensor) -> Tensor:
    """Return the weights (after, before): a triangle around the center of each output token, of sum 1."""
    precise = accumulator_of(like)
    step = before / after
    centre = (torch.arange(after, device=like.device, dtype=precise) + 0.5) * step - 0.5
    distance = (torch.arange(before, device=like.device, dtype=precise) - centre[:, None]).abs()
    weights = (1 - distance / max(step, 1.0)).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)
