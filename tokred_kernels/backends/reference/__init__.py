# SPDX-License-Identifier: MIT
"""Pure PyTorch: readable, differentiable by autograd, in the dtype given, and exportable to ONNX.

On a GPU its results are bitwise reproducible: sums over slots have a fixed order (`segments`), and the precision of
matrix products does not depend on torch's TF32 settings (`product`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from tokred_kernels.dtypes import is_autocasting

# torch.compiler.is_exporting needs torch 2.7. Before that every compiled call counts as an export.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def is_exporting() -> bool:
    """Return whether the call becomes part of a graph for other runtimes: torch.export, torch.jit.trace, ONNX."""
    return _is_exporting() or torch.jit.is_tracing()


def runs_on_gpu(tensor: Tensor) -> bool:
    """Return whether atomics and TF32 have to be avoided. Exported graphs keep the plain operators instead."""
    return tensor.is_cuda and not is_exporting()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` without autocast, with float32 accuracy or better, forward and backward.

    On a GPU the product is computed in float64 and rounded once. torch's TF32 settings are global to the process, so
    changing them around a call would affect other threads, and could not reach the backward pass or a compiled graph.
    """
    with _no_autocast(a):
        return (a.double() @ b.double()).to(a.dtype) if runs_on_gpu(a) else a @ b


def _no_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.autocast(tensor.device.type, enabled=False) if is_autocasting(tensor) else nullcontext()
