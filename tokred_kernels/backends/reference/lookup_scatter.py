# SPDX-License-Identifier: MIT
"""Lookup attention's scatter with all weights in memory, (B, H, M, N)."""

from __future__ import annotations

from torch import Tensor

from tokred_kernels.backends.reference import product
from tokred_kernels.backends.reference.lookup_gather import lookup_scores


def lookup_scatter(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float) -> Tensor:
    """See `ops.lookup_scatter`."""
    weights = (lookup_scores(q, k, scale) - lse[..., None]).exp()
    return product(weights.transpose(-2, -1), v.to(weights.dtype)).to(q.dtype)
