# SPDX-License-Identifier: MIT
"""Triton kernels, for NVIDIA and AMD GPUs, and on CPU tensors by Triton's interpreter.

The interpreter is chosen when kernels are defined: TRITON_INTERPRET=1 must be set before anything imports triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends import triton_interprets

INTERPRETED = tl.constexpr(triton_interprets())


def on_device(tensor: Tensor) -> torch.cuda.device_of:
    """A context in which the tensor's device is the current one, where Triton launches; nothing on the CPU."""
    return torch.cuda.device_of(tensor)


@triton.jit
def is_nan(value):
    """Where a tile is NaN."""
    return value != value  # noqa: PLR0124


# Triton 3.7's interpreter keeps bfloat16 as bits in uint16: it cuts float32 to bfloat16 where a GPU rounds, and would
# multiply the bits as integers in `tl.dot`. The next two make it do what the GPU does.


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """A float32 tile rounded to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        value = tl.where(is_nan(value), value, rounded)
    return value.to(dtype)


@triton.jit
def multiply_add(a, b, total):
    """total + a b^T, float32, of float32 without TF32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, tl.trans(b), total, input_precision="ieee")
