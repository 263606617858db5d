# SPDX-License-Identifier: MIT
"""What sums are kept in."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocasting(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor lies; torch raises where it knows none, as on "meta"."""
    kind = tensor.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def autocasted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where that is on, but for float64: as torch's own attention takes its inputs.

    On a GPU autocast lets norms return float32 and linear layers half precision, so that q, k and v may differ.
    """
    if not is_autocasting(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def accumulator_of(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
