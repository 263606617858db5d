# SPDX-License-Identifier: MIT
"""How similar the tokens of each window are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.reference import window_similarity as reference
from tokred_kernels.backends.registration import register
from tokred_kernels.windows import RULES, SCHEMA, Windows


def window_similarity(x: Tensor, windows: Windows, threshold: float, backend: str) -> tuple[Tensor, Tensor]:
    """The mean cosine of the pairs of different tokens in each window of x (B, N, C), (B, W) float32, by rows.

    And how many of them are at least the threshold, (B,) int32. A token of norm zero has cosine 0 with all. -inf where
    a token is NaN or infinite: such a window never merges.
    """
    threshold = max(threshold, torch.finfo(torch.float32).min)  # that of windows that never merge lies below it
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
