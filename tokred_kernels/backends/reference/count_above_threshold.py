# SPDX-License-Identifier: MIT
"""The count of scores that reach a threshold."""

from __future__ import annotations

import torch
from torch import Tensor


def count_above_threshold(score: Tensor, threshold: float, divisor: float, own: bool) -> Tensor:
    """See `ops.count_above_threshold`."""
    present = score > -torch.inf
    least: Tensor | float = threshold
    if divisor:
        score = score.double()
        number = present.sum(1, keepdim=True)
        mean = torch.where(present, score, 0.0).sum(1, keepdim=True) / number
        deviation = torch.where(present, score - mean, 0.0)
        std = ((deviation * deviation).sum(1, keepdim=True) / (number - 1)).sqrt()  # of one score alone: 0 / 0, NaN
        if not own:
            mean, std = mean.mean(), std.mean()
        least = mean + std / divisor
    return (present & (score >= least)).sum(1, dtype=torch.int32)
