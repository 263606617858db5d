# SPDX-License-Identifier: MIT
"""Pure PyTorch: readable, differentiable by autograd, in the dtype given, and exportable to ONNX."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tokred_kernels.dtypes import is_autocasting


def unrounded(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast, if it is on, does not turn the products of float32 into those of another dtype."""
    return torch.autocast(tensor.device.type, enabled=False) if is_autocasting(tensor) else nullcontext()
