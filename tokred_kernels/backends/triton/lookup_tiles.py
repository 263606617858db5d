# SPDX-License-Identifier: MIT
"""What the kernels of lookup attention share: the split of many tokens over programs, and what adds its parts up."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.triton import narrow
from tokred_kernels.backends.triton.attention_tiles import LN_2, load_rows, load_vectors, place, shares, store_vectors
from tokred_kernels.backends.triton.configs import COMBINE_CONFIGS, MAX_HEAD_WIDTH, combine_config

# A weight of float16 is multiplied by this before it is rounded: one of many thousand tokens has few digits else.
HALF_RANGE = tl.constexpr(2.0**8)
_SPLITS_AT_ONCE = tl.constexpr(4)


def check_width(op: str, q: Tensor) -> None:
    """Raise ValueError where a head has more channels than a program can hold."""
    if q.shape[-1] > MAX_HEAD_WIDTH:
        raise ValueError(
            f"tokred_kernels.{op}: q must have at most {MAX_HEAD_WIDTH} channels a head, which is the most "
            f'that triton kernels take (use the backend "cpu" or "reference"), got shape {tuple(q.shape)}'
        )


def heads_last(tensor: Tensor) -> tuple[int, int, int, int]:
    """(B, N, H, d) for (B, H, N, d): how results lie in memory."""
    images, heads, tokens, channels = tensor.shape
    return images, tokens, heads, channels


def parts_of(q: Tensor, splits: int, *, vectors: int, rows: int) -> list[Tensor | None]:
    """What `splits` programs leave of each query: float32 vectors, and numbers; None where one does it all."""
    images, heads, compressed, channels = q.shape
    if splits == 1:
        return [None] * (vectors + rows)
    shape = (images, heads, splits, compressed)
    made = [q.new_empty((*shape, channels), dtype=LEVEL_DTYPE) for _ in range(vectors)]
    return [*made, *(q.new_empty(shape, dtype=LEVEL_DTYPE) for _ in range(rows))]
