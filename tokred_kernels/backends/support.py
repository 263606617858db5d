# SPDX-License-Identifier: MIT
"""The backends, whether one can run a call, and the function that runs it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokred_kernels.backends.native.availability import cpu_can_run, cuda_can_run
from tokred_kernels.backends.reference import availability as reference
from tokred_kernels.backends.triton import availability as triton
from tokred_kernels.ops.registry import SPECS


class Backend(NamedTuple):
    """The folder that has a backend's functions, and the function that says whether it can run a call."""

    folder: str
    can_run: Callable[..., str | None]


_BACKENDS = {
    "reference": Backend("reference", reference.can_run),
    "cpu": Backend("native", cpu_can_run),
    "cuda": Backend("native", cuda_can_run),
    "triton": Backend("triton", triton.can_run),
}
BACKENDS = tuple(_BACKENDS)


def can_run(op: str, backend: str, device: torch.device | str, dtype: torch.dtype, head_dim: int = 0) -> str | None:
    """Return None if `backend` can run `op`, or the reason why it cannot.

    Args:
        op: a name in `ops.registry.SPECS`. If it has parts, the backend must run all of them.
        backend: a name in `BACKENDS`.
        device: of the tensors. On a machine without a GPU, the facts about the GPU itself are left out.
        dtype: of the tokens.
        head_dim: the head dimension of attention; 0 for other ops.
    """
    device = torch.device(device)
    for part in SPECS[op].parts or (op,):
        if backend not in ("reference", *SPECS[part].backends):
            return f"{part} has no {backend} kernel"
        reason = _BACKENDS[backend].can_run(SPECS[part], device, dtype, head_dim)
        if reason is not None:
            return reason
    return None


@functools.cache
def implementation(backend: str, op: str) -> Callable[..., Any]:
    """Return the function of `backend` that computes `op`, imported at first use."""
    return getattr(importlib.import_module(f"tokred_kernels.backends.{_BACKENDS[backend].folder}.{op}"), op)
