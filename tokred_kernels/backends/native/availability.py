# SPDX-License-Identifier: MIT
"""Say whether the C++ and CUDA kernels can run a call."""

from __future__ import annotations

import torch

from tokred_kernels.backends import native
from tokred_kernels.backends.devices import FLOATS, device_index, limits
from tokred_kernels.ops.registry import OpSpec


def cpu_can_run(op: OpSpec, device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> str | None:
    """Return None if the C++ kernel of `op` can run, or the reason why it cannot."""
    return _against_module("cpu", device) or limits(op, "cpu", dtype, (*FLOATS, torch.float64), head_dim)


def cuda_can_run(op: OpSpec, device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> str | None:
    """Return None if the CUDA kernel of `op` can run, or the reason why it cannot."""
    if native.MODULE is not None and native.CUDA is None:
        return "this build has no CUDA kernels; reinstall with nvcc on the path and TOKRED_CUDA=1"
    reason = _against_module("cuda", device) or limits(op, "cuda", dtype, FLOATS, head_dim)
    if reason is None and torch.cuda.is_available():
        reason = native.cuda_failure(device_index(device))
    return reason


def _against_module(backend: str, device: torch.device) -> str | None:
    if native.MODULE is None:
        return f"the native module is missing ({native.FAILURE}); reinstall the package"
    if device.type != backend:
        return f"{backend} kernels need a {backend} tensor, got one on {device.type}"
    return None
