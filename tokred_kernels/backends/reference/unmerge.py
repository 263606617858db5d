# SPDX-License-Identifier: MIT
"""Unmerge as a gather."""

from __future__ import annotations

import torch
from torch import Tensor


def unmerge(y: Tensor, dest: Tensor) -> Tensor:
    """See `ops.unmerge`."""
    batch, num_out, channels = y.shape
    if num_out == 0:
        return y.new_zeros(batch, dest.shape[1], channels)
    x = y.gather(1, dest.clamp(min=0).long()[..., None].expand(-1, -1, channels))
    return torch.where((dest < 0)[..., None], torch.zeros((), dtype=y.dtype, device=y.device), x)
