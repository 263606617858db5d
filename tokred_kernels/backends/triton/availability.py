# SPDX-License-Identifier: MIT
"""Say whether the Triton kernels can run a call."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import torch

from tokred_kernels.backends.devices import FLOATS, device_index, limits
from tokred_kernels.ops.registry import OpSpec

OLDEST_TRITON = (3, 3)
# Triton's own minimum for the matrix units and asynchronous copies that the kernels use.
OLDEST_CAPABILITY = (8, 0)


def triton_interprets() -> bool:
    """Return whether Triton's interpreter is on, so that its kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def can_run(op: OpSpec, device: torch.device, dtype: torch.dtype, head_dim: int = 0) -> str | None:
    """Return None if the Triton kernel of `op` can run, or the reason why it cannot."""
    reason = triton_failure()
    if reason is not None:
        return reason
    if device.type != "cuda" and not (device.type == "cpu" and triton_interprets()):
        return (
            f"triton kernels need a GPU tensor, got one on {device.type} (or set TRITON_INTERPRET=1 before the import)"
        )
    reason = limits(op, "triton", dtype, FLOATS, head_dim)
    if reason is None and device.type == "cuda" and torch.cuda.is_available():
        reason = capability_failure(device_index(device))
    return reason


@functools.cache
def triton_failure() -> str | None:
    """Return why no Triton kernel can run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed (pip install "tokred_kernels[triton]")'
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build with another name, such as that of torch's nightlies
        return None
    if tuple(map(int, version.split(".")[:2])) >= OLDEST_TRITON:
        return None
    oldest = ".".join(map(str, OLDEST_TRITON))
    return f"triton {version} is too old: its kernels need {oldest}, which comes with torch 2.7"


@functools.cache
def capability_failure(index: int) -> str | None:
    """Return why Triton kernels cannot run on this GPU at all, or None."""
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CAPABILITY:
        return None
    oldest = "{}.{}".format(*OLDEST_CAPABILITY)
    return "triton kernels need compute capability {}, this GPU has {}.{}".format(oldest, *capability)
