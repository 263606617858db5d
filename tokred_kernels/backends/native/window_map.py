# SPDX-License-Identifier: MIT
"""The map that merges the most similar windows, on the CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.native import address, kernels, stream
from tokred_kernels.windows import Windows


def window_map(
    score: Tensor,
    windows: Windows,
    r: int,
    counts: Tensor | None = None,
    starts_out: Tensor | None = None,
    num_out: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.window_map`: dest, members, begin, count."""
    score = score.contiguous()
    images, tokens = score.shape[0], windows.num_tokens()
    slots = (images, tokens - r * (windows.size() - 1)) if counts is None else (num_out,)
    dest = score.new_empty(images, tokens, dtype=torch.int32)
    members = dest.new_empty(images * tokens)
    begin, count = dest.new_empty(slots), dest.new_empty(slots)
    kernels(score).window_map(
        *(tuple(windows), score.data_ptr(), images, r, address(counts), address(starts_out)),
        *(dest.data_ptr(), members.data_ptr(), begin.data_ptr(), count.data_ptr()),
        *(begin.numel(), stream(score)),
    )
    return dest, members, begin, count
