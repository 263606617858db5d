# SPDX-License-Identifier: MIT
"""Composition of two maps."""

from __future__ import annotations

import torch
from torch import Tensor


def compose(first: Tensor, second: Tensor) -> Tensor:
    """See `token_map_ops.compose`."""
    if second.shape[1] == 0:
        return torch.full_like(first, -1)
    there = second.gather(1, first.clamp(min=0).long())
    return torch.where(first < 0, -1, there)
