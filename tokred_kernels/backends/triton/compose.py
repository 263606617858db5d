# SPDX-License-Identifier: MIT
"""Compose two maps in Triton: a gather of slots, in one launch bound by latency."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.triton.common import on_device
from tokred_kernels.backends.triton.configs import SCAN_CONFIG


def compose(first: Tensor, second: Tensor) -> Tensor:
    """See `token_map_ops.compose`."""
    first = first.contiguous()
    dest = torch.empty_like(first)
    if dest.numel():
        with on_device(first):
            compose_kernel[(triton.cdiv(dest.numel(), SCAN_CONFIG.block),)](
                *(first, second.contiguous(), dest, dest.numel(), first.shape[1], second.shape[1]),
                BLOCK=SCAN_CONFIG.block,
                num_warps=SCAN_CONFIG.num_warps,
            )
    return dest


@triton.jit(do_not_specialize=["rows", "tokens", "middle"])
def compose_kernel(
    first,  # (B * N)
    second,  # (B * N1)
    dest,  # out: (B * N)
    rows,
    tokens,
    middle,
    BLOCK: tl.constexpr,
):
    """A program takes BLOCK tokens of any images."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(first + row, mask=row < rows, other=-1)
    at = (row // tokens).to(tl.int64) * middle + slot
    tl.store(dest + row, tl.load(second + at, mask=slot >= 0, other=-1), mask=row < rows)
