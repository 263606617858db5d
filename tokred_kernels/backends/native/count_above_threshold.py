# SPDX-License-Identifier: MIT
"""The count of scores that reach a threshold, on the CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.native import address, kernels, stream


def count_above_threshold(score: Tensor, threshold: float, divisor: float, own: bool) -> Tensor:
    """See `ops.count_above_threshold`."""
    score = score.contiguous()
    images, sources = score.shape
    counts = score.new_empty(images, dtype=torch.int32)
    moments = score.new_empty((images, 2), dtype=torch.float64) if score.is_cuda and divisor else None
    kernels(score).count_above_threshold(
        *(score.data_ptr(), images, sources, threshold, divisor, int(own)),
        *(address(moments), counts.data_ptr(), stream(score)),
    )
    return counts
