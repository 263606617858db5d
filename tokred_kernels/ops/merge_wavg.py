# SPDX-License-Identifier: MIT
"""Merge by size-weighted average, with the sizes kept."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.ops.merge import check_against_map, prepare_weight, segment_reduce
from tokred_kernels.token_map import TokenMap


def merge_wavg(x: Tensor, token_map: TokenMap, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Average the tokens that share a slot, each weighted by how many it stands for (ToMe, section 3.1, `merge_wavg`).

    Args:
        x: (B, N, C), or (T, C) if the map takes packed tokens.
        token_map: from N tokens to N' slots.
        size: (B, N, 1) or (B, N), or (T, 1) or (T,), how many first tokens each token stands for; None for 1 each.

    Returns:
        The merged tokens (B, N', C) in x's dtype, and their sizes, (B, N', 1), or (B, N') if `size` came so: float32
        whatever x is (256 + 1 is 256 in bfloat16), save that a float64 `size` with a float64 `x` stays float64. From a
        packed map (T', C) and (T', 1), or (T',).

    Differentiable once in `x` and `size`. Raises as `merge` does.
    """
    check_against_map("merge_wavg", x, token_map)
    weight = None if size is None else prepare_weight("merge_wavg", "size", size, x)
    y, total = segment_reduce(x, token_map, weight, "mean", weight_sum=True)
    assert total is not None  # it was asked for
    return y, like_size(total, size, column=size is None or size.dim() == x.dim())


def like_size(total: Tensor, size: Tensor | None, column: bool) -> Tensor:
    """The (B, N') sums of sizes as they are handed out: float32, or float64 if `size` is; as a column (B, N', 1)."""
    if total.dtype == torch.float64 and (size is None or size.dtype != torch.float64):
        total = total.float()
    return total.unsqueeze(-1) if column else total
