# SPDX-License-Identifier: MIT
"""Count the scores of each image that reach a threshold (ALGM, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.reference import count_above_threshold as reference
from tokred_kernels.backends.registration import register


def count_above_threshold(score: Tensor, threshold: float, divisor: float, own: bool, backend: str) -> Tensor:
    """Return (B,) int32, how many entries of `score` (B, S) float32 are at least the threshold; -inf never counts.

    The threshold is `threshold` if `divisor` is 0. Otherwise it is mean + std / divisor of the scores above -inf, in
    float64, with the mean and unbiased std of each image; they are averaged over the batch unless `own` is True. The
    std of fewer than two scores is NaN, and nothing reaches a threshold of NaN.
    """
    if backend != "reference":
        backend = backends.companion("count_above_threshold", backend, score)
    if backend == "reference":
        return reference.count_above_threshold(score, threshold, divisor, own)
    return _count_above_threshold(score, threshold, divisor, own, backend)


def _fake(score: Tensor, threshold: float, divisor: float, own: bool, backend: str) -> Tensor:
    return score.new_empty(score.shape[0], dtype=torch.int32)


_count_above_threshold = register(
    "count_above_threshold(Tensor score, float threshold, float divisor, bool own, str backend) -> Tensor",
    _fake,
    {"score": "float32 (B, S); B * S <= ROWS"},
)
