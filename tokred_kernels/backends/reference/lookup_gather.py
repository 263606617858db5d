# SPDX-License-Identifier: MIT
"""Lookup attention's gather with all weights in memory, (B, H, M, N)."""

from __future__ import annotations

from torch import Tensor

from tokred_kernels.backends.reference import product
from tokred_kernels.dtypes import accumulator_of


def lookup_gather(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `ops.lookup_gather`."""
    scores = lookup_scores(q, k, scale)
    lse = scores.logsumexp(-1)
    return product((scores - lse[..., None]).exp(), v.to(scores.dtype)).to(q.dtype), lse


def lookup_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(B, H, M, N), in float32, or float64 of such."""
    accumulator = accumulator_of(q)
    return product(q.to(accumulator), k.to(accumulator).transpose(-2, -1)) * scale
