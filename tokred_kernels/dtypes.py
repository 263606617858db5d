# SPDX-License-Identifier: MIT
"""The dtypes of inputs under autocast, and of sums."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocasting(tensor: Tensor) -> bool:
    """Return whether autocast is on for the tensor's device; torch raises for devices without it, such as meta."""
    kind = tensor.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def autocasted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in autocast's dtype if autocast is on, except float64: torch's own attention does the same.

    On a GPU under autocast, norms return float32 and linear layers half precision, so q, k and v can differ.
    """
    if not is_autocasting(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def accumulator_of(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
