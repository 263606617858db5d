# SPDX-License-Identifier: MIT
"""The map that keeps the highest scores."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.reference.rank_candidates import ranks


def keep_topk(scores: Tensor, k: int, first: int, fuse: bool) -> Tensor:
    """Return `dest` (B, N) int32; see `ops.keep_topk`."""
    free = scores[:, first:]
    rank = ranks(torch.where(free.isnan(), -torch.inf, free))
    slot = torch.where(rank < k, first + rank, first + k if fuse else -1)
    leading = torch.arange(first, device=scores.device).expand(scores.shape[0], -1)
    return torch.cat([leading, slot], 1).int()
