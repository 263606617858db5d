# SPDX-License-Identifier: MIT
"""The map that merges the most similar windows."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.reference.rank_candidates import ranks
from tokred_kernels.backends.reference.to_csr import to_csr
from tokred_kernels.windows import Windows


def window_map(
    score: Tensor,
    windows: Windows,
    r: int,
    counts: Tensor | None = None,
    starts_out: Tensor | None = None,
    num_out: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.window_map`."""
    if counts is None or starts_out is None:
        dest = window_dest(score, windows, r)
        return dest, *to_csr(dest, windows.num_tokens() - r * (windows.size() - 1))
    dest = window_dest(score, windows, counts[:, None]) + starts_out[:-1, None]
    members, begin, count = to_csr(dest.view(1, -1), num_out)
    return dest, members, begin[0], count[0]


def window_dest(score: Tensor, windows: Windows, r: Tensor | int) -> Tensor:
    """Return `dest` (B, N) int32 of the map that merges the `r` windows of highest score; `r` can be (B, 1)."""
    first, batch, device = windows.first, score.shape[0], score.device
    row = torch.arange(windows.grid_height, device=device)[:, None] // windows.height
    column = torch.arange(windows.grid_width, device=device) // windows.width
    window = torch.where(
        (row < windows.down()) & (column < windows.across()), row * windows.across() + column, -1
    ).flatten()

    rank = ranks(score)
    of_token = rank[:, window.clamp(min=0)] if windows.number() else rank.new_zeros(batch, window.numel())
    merged = (window >= 0) & (of_token < r)
    others = (~merged).long().cumsum(1) - 1
    slot = first + torch.where(merged, of_token, r + others)
    leading = torch.arange(first, device=device).expand(batch, -1)
    return torch.cat([leading, slot], 1).int()
