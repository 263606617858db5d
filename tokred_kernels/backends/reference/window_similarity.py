# SPDX-License-Identifier: MIT
"""The mean pairwise cosine of each window."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.reference.rank_candidates import inverse_norm
from tokred_kernels.windows import Windows


def window_similarity(x: Tensor, windows: Windows, threshold: float) -> tuple[Tensor, Tensor]:
    """See `ops.window_similarity`."""
    score = mean_cosine(x, windows)
    return score, (score >= threshold).sum(1, dtype=torch.int32)


def mean_cosine(x: Tensor, windows: Windows, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, W), computed in `dtype`."""
    batch, _, channels = x.shape
    grid = x[:, windows.first :].reshape(batch, windows.grid_height, windows.grid_width, channels)
    inside = grid[:, : windows.down() * windows.height, : windows.across() * windows.width].to(dtype)
    cut = inside.reshape(batch, windows.down(), windows.height, windows.across(), windows.width, channels)
    vectors = cut.transpose(2, 3).reshape(batch, windows.number(), windows.size(), channels)
    unit = vectors * inverse_norm(vectors)
    # The sum over i != j of u_i . u_j is |sum u_i|^2 - sum |u_i|^2.
    total = unit.sum(2)
    pairs = (total * total).sum(-1) - (unit * unit).sum((-1, -2))
    similarity = pairs / (windows.size() * (windows.size() - 1))
    return torch.where(similarity.isnan(), -torch.inf, similarity)
