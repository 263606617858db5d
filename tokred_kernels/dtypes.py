# SPDX-License-Identifier: MIT
"""What sums are kept in."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulator_of(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
