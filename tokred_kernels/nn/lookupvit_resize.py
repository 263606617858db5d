# SPDX-License-Identifier: MIT
"""Resizing a grid of tokens, of any number of dimensions, linearly along each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokred_kernels.dtypes import accumulator_of


def resize_tokens(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Tokens (B, N, C) of the grid `before`, by rows, resized to (B, M, C) of the grid `after`.

    Bilinear, trilinear, and so on, with antialiasing: where the grid gets smaller, the triangle that weighs neighbours
    gets as many times wider, so that each token before counts in some token after. Without, 5 x 5 tokens of 24 x 24
    would be made of 100 of the 576 alone. For two dimensions it is torch's `interpolate(mode="bilinear",
    antialias=True)`, which knows no third one, and whose backward adds by atomics on a GPU: this one is products of
    small matrices. Equal grids give x itself.
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
    return x.to(dtype)  # autocast would round what the residual stream starts with


def resize_flops(channels: int, before: Sequence[int], after: Sequence[int]) -> int:
    """Operations of `resize_tokens` for one image."""
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
    """(after, before), rows of sum 1: a triangle around each new token's centre."""
    precise = accumulator_of(like)
    step = before / after
    centre = (torch.arange(after, device=like.device, dtype=precise) + 0.5) * step - 0.5
    distance = (torch.arange(before, device=like.device, dtype=precise) - centre[:, None]).abs()
    weights = (1 - distance / max(step, 1.0)).clamp(min=0)
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)
