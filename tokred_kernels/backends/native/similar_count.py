# SPDX-License-Identifier: MIT
"""How many scores reach a threshold, on the CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.native import address, kernels, stream


def similar_count(score: Tensor, threshold: float, divisor: float, own: bool) -> Tensor:
    """See `ops.similar_count`."""
    score = score.contiguous()
    images, sources = score.shape
    counts = score.new_empty(images, dtype=torch.int32)
    moments = score.new_empty((images, 2), dtype=torch.float64) if score.is_cuda and divisor else None
    kernels(score).similar_count(
        *(score.data_ptr(), images, sources, threshold, divisor, int(own)),
        *(address(moments), counts.data_ptr(), stream(score)),
    )
    return counts
