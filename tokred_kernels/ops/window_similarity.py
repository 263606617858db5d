# SPDX-License-Identifier: MIT
"""Compute the similarity of the tokens of each window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.reference import window_similarity as reference
from tokred_kernels.backends.registration import register
from tokred_kernels.windows import RULES, SCHEMA, Windows


def window_similarity(x: Tensor, windows: Windows, threshold: float, backend: str) -> tuple[Tensor, Tensor]:
    """Return the mean cosine of each window of x (B, N, C), and how many windows reach the threshold.

    The mean cosine, (B, W) float32 by rows, is over the pairs of different tokens. A token of norm 0 has cosine 0 with
    all tokens. A window with a NaN or infinite token gets -inf and never merges. The counts are (B,) int32.
    """
    threshold = max(threshold, torch.finfo(torch.float32).min)  # above -inf, so that such windows never count
    if backend == "reference":
        return reference.window_similarity(x, windows, threshold)
    return _window_similarity(x, *windows, threshold, backend)


def _implementation(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *windows, threshold, backend = others
    return backends.implementation(backend, "window_similarity")(x, Windows(*windows), threshold)


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    score = x.new_empty((x.shape[0], Windows(*others[:-2]).number()), dtype=torch.float32)
    return score, x.new_empty(x.shape[0], dtype=torch.int32)


_window_similarity = register(
    f"window_similarity(Tensor x, {SCHEMA}, float threshold, str backend) -> (Tensor score, Tensor counts)",
    _fake,
    {"x": "float (B, N, C); B * N <= ROWS", **RULES},
    _implementation,
)
