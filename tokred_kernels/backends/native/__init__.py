# SPDX-License-Identifier: MIT
"""The C++ and CUDA kernels, through one pybind11 module that takes addresses: one adaptor an op serves both devices."""

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

try:  # after torch, so that the module's OpenMP is torch's own, and one thread pool serves both
    MODULE = importlib.import_module("tokred_kernels._native")
    CUDA = getattr(MODULE, "cuda", None)
except ModuleNotFoundError:  # the reference and Triton kernels work without it
    FAILURE = "it was not built: TOKRED_NATIVE=0 was set at installation, or the source tree is not installed"
except ImportError as error:  # it is there, but does not load
    FAILURE = str(error)

# Whether products of bfloat16 are done in AMX tiles on the CPU.
AMX = MODULE is not None and MODULE.cpu.instruction_set() == "amx"
# Whether the CPU's vectors have 64 bytes.
WIDE_VECTORS = MODULE is not None and MODULE.cpu.instruction_set() in ("avx512", "amx")

DTYPE_CODE = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
# A result on the CPU of so many bytes is asked for in large pages. As numpy has it: below, the pages may not fill.
LARGE_BYTES = 4 << 20
REDUCE_CODE = {"sum": 0, "mean": 1, "amax": 2}


# Torch's own short ways to these two numbers; private, so either may go missing.
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None) or torch.cuda.current_device
_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda device: torch.cuda.current_stream(device).cuda_stream
)


class _Elsewhere:
    """The CUDA ops, each run with `device` made the current one, where CUDA launches and asks for attributes."""

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
    """The ops of the tensor's device. Every native call gets them here, so here the device is made the current one."""
    if not tensor.is_cuda:
        return MODULE.cpu  # type: ignore[union-attr]
    device = tensor.get_device()
    return CUDA if device == _current_device() else _Elsewhere(device)


def stream(tensor: Tensor) -> int:
    """Torch's current stream on the tensor's device, 0 on the CPU."""
    return _raw_stream(tensor.get_device()) if tensor.is_cuda else 0


def address(tensor: Tensor | None) -> int:
    """Where the data starts; 0 for None."""
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
    """A new tensor like this one, for a result: uninitialised, and on the CPU in large pages where it is large.

    The allocator hands large memory back to the system and fetches it anew, so that most calls would fault on every
    small page of what they write.
    """
    result = tensor.new_empty(*size)  # torch reads numbers one by one faster than a tuple
    if result.nbytes >= LARGE_BYTES and not result.is_cuda:
        MODULE.cpu.use_large_pages(result.data_ptr(), result.nbytes)  # type: ignore[union-attr]
    return result


def rows(tensor: Tensor) -> Tensor:
    """The (B, N, C) tensor itself where its rows lie at one stride and their elements side by side, else a copy."""
    _, tokens, channels = tensor.shape
    outer, stride, inner = tensor.stride()
    if tokens == 1 and stride != outer:  # torch lets the stride over one token be anything, and `contiguous` leaves it
        tensor, stride = tensor.as_strided(tensor.shape, (outer, outer, inner)), outer
    if (inner == 1 or channels == 1) and (outer == tokens * stride or tensor.shape[0] == 1) and stride >= channels:
        return tensor
    return tensor.contiguous()
