# SPDX-License-Identifier: MIT
"""Merge by size-weighted average, and return the sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.ops.merge import check_against_map, prepare_weight, segment_reduce
from tokred_kernels.token_map import TokenMap


def merge_wavg(x: Tensor, token_map: TokenMap, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Average the tokens that share a slot, each weighted by its size (ToMe, section 3.1, `merge_wavg`).

    Args:
        x: (B, N, C), or (T, C) if the map takes packed tokens.
        token_map: from N tokens to N' slots.
        size: (B, N, 1) or (B, N), or (T, 1) or (T,), how many original tokens each token represents; None means 1 each.

    Returns:
        The merged tokens (B, N', C) in x's dtype, and their sizes (B, N', 1), or (B, N') if `size` is (B, N). Sizes are
        float32 for every dtype of x (256 + 1 is 256 in bfloat16), except that a float64 `size` with a float64 `x` stays
        float64. From a packed map: (T', C) and (T', 1), or (T',).

    Differentiable once in `x` and `size`. Raises the errors of `merge`.
    """
    check_against_map("merge_wavg", x, token_map)
    weight = None if size is None else prepare_weight("merge_wavg", "size", size, x)
    y, total = segment_reduce(x, token_map, weight, "mean", weight_sum=True)
    assert total is not None  # because of weight_sum
    return y, format_size(total, size, column=size is None or size.dim() == x.dim())


def format_size(total: Tensor, size: Tensor | None, column: bool) -> Tensor:
    """Return the sums of sizes (B, N') in float32, or float64 if `size` is float64; (B, N', 1) if `column`."""
    if total.dtype == torch.float64 and (size is None or size.dtype != torch.float64):
        total = total.float()
    return total.unsqueeze(-1) if column else total
