# SPDX-License-Identifier: MIT
"""Pure PyTorch: readable, differentiable by autograd, in the dtype given, and exportable to ONNX."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def unrounded(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast, if it is on, does not turn the products of float32 into those of another dtype."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
