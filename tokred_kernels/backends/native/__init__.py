# SPDX-License-Identifier: MIT
"""The C++ and CUDA kernels, called through one pybind11 module that takes addresses; each op has one file for both."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MODULE: ModuleType | None = None
CUDA: ModuleType | None = None
FAILURE = ""

try:  # after torch, so that the module uses torch's OpenMP and thread pool
    MODULE = importlib.import_module("tokred_kernels._native")
    CUDA = getattr(MODULE, "cuda", None)
except ModuleNotFoundError:  # the reference and Triton kernels work without it
    FAILURE = "it was not built: TOKRED_NATIVE=0 was set at installation, or the source tree is not installed"
except ImportError as error:  # the module exists, but does not load
    FAILURE = str(error)

# True if the CPU kernels use AMX for bfloat16 products.
AMX = MODULE is not None and MODULE.cpu.instruction_set() == "amx"
# True if the CPU's vectors have 64 bytes.
WIDE_VECTORS = MODULE is not None and MODULE.cpu.instruction_set() in ("avx512", "amx")

DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
# A CPU result of at least this size requests large pages. This is numpy's limit too: smaller results may not fill them.
LARGE_BYTES = 4 << 20
REDUCE_CODE = {"sum": 0, "mean": 1, "amax": 2}


# torch's fastest functions for these two numbers. They are private, and a later torch can drop them.
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None) or torch.cuda.current_device
_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda device: torch.cuda.current_stream(device).cuda_stream
)


class _OnOtherDevice:
    """The CUDA ops, each called with `device` as the current device, on which CUDA launches."""

    def __init__(self, device: int) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(CUDA, name)

        def run(*arguments: Any) -> Any:
            with torch.cuda.device(self._device):
                return op(*arguments)

        return run


@functools.cache
def cuda_failure(device_index: int) -> str | None:
    """Return the reason why the CUDA kernels cannot run on this GPU, or None if they can."""
    if CUDA is None:
        return "this build has no CUDA kernels"
    with torch.cuda.device(device_index):
        return CUDA.why_unusable() or None


def kernels(tensor: Tensor) -> Any:
    """Return the ops for the tensor's device; they make that device the current one."""
    if not tensor.is_cuda:
        return MODULE.cpu  # type: ignore[union-attr]
    device = tensor.get_device()
    return CUDA if device == _current_device() else _OnOtherDevice(device)


def stream(tensor: Tensor) -> int:
    """Return torch's current stream on the tensor's device; 0 on the CPU."""
    return _raw_stream(tensor.get_device()) if tensor.is_cuda else 0


def address(tensor: Tensor | None) -> int:
    """Return the address of the tensor's data; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def check_indices(op: str, like: Tensor, *tensors: Tensor) -> None:
    """Raise unless the index tensors are contiguous int32 tensors on the device of `like`."""
    on_cpu, int32 = like.is_cpu, torch.int32
    for tensor in tensors:
        on_device = tensor.is_cpu if on_cpu else tensor.device == like.device
        if tensor.dtype is not int32 or not on_device or not tensor.is_contiguous():
            raise ValueError(
                f"tokred_kernels.{op}: indices must be contiguous int32 tensors on {like.device}, "
                f"got {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
            )


def empty_result(tensor: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """Return an uninitialised tensor for a result; if it is large and on the CPU, in large pages.

    The allocator returns large blocks to the system, so with small pages most calls would fault on every page that they
    write.
    """
    result = tensor.new_empty(*size)  # torch parses separate ints faster than a tuple
    if result.nbytes >= LARGE_BYTES and not result.is_cuda:
        MODULE.cpu.use_large_pages(result.data_ptr(), result.nbytes)  # type: ignore[union-attr]
    return result


def rows(tensor: Tensor) -> Tensor:
    """Return the (B, N, C) tensor if its rows have one stride and contiguous elements, else a copy."""
    _, tokens, channels = tensor.shape
    outer, stride, inner = tensor.stride()
    if tokens == 1 and stride != outer:  # the stride of a dimension of size 1 is arbitrary, and `contiguous` keeps it
        tensor, stride = tensor.as_strided(tensor.shape, (outer, outer, inner)), outer
    if (inner == 1 or channels == 1) and (outer == tokens * stride or tensor.shape[0] == 1) and stride >= channels:
        return tensor
    return tensor.contiguous()
