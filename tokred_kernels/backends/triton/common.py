# SPDX-License-Identifier: MIT
"""Functions that the Triton kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.triton.availability import triton_interprets

INTERPRETED = tl.constexpr(triton_interprets())


def on_device(tensor: Tensor) -> torch.cuda.device_of:
    """Return a context that makes the tensor's GPU the current device, on which Triton launches; no-op on the CPU."""
    return torch.cuda.device_of(tensor)


@triton.jit
def is_nan(value):
    """Return a mask of the NaN entries of a tile."""
    return value != value  # noqa: PLR0124


# Triton 3.7's interpreter keeps bfloat16 as bits in uint16: it truncates float32 to bfloat16, and `tl.dot` multiplies
# the bits as integers. The next two functions make it round and multiply as a GPU does.


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """Round a float32 tile to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        value = tl.where(is_nan(value), value, rounded)
    return value.to(dtype)


@triton.jit
def multiply_add(a, b, total):
    """Return total + a b^T in float32; float32 operands are not rounded to TF32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), total, input_precision="ieee")
