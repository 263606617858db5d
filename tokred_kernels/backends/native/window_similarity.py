# SPDX-License-Identifier: MIT
"""The mean pairwise cosine of each window, on the CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.native import DTYPE_CODE, kernels, stream
from tokred_kernels.backends.native.bipartite_match import inner_dense
from tokred_kernels.windows import Windows


def window_similarity(x: Tensor, windows: Windows, threshold: float) -> tuple[Tensor, Tensor]:
    """See `ops.window_similarity`."""
    x = inner_dense(x)
    images, _, channels = x.shape
    score = x.new_empty(images, windows.number(), dtype=torch.float32)
    counts = x.new_empty(images, dtype=torch.int32)
    kernels(x).window_similarity(
        *(tuple(windows), x.data_ptr(), x.stride(0), x.stride(1), images, channels, DTYPE_CODE[x.dtype]),
        *(threshold, score.data_ptr(), counts.data_ptr(), stream(x)),
    )
    return score, counts
