# SPDX-License-Identifier: MIT
"""How the results of attention lie in memory."""

from __future__ import annotations

from torch import Tensor


def heads_last(tensor: Tensor) -> tuple[int, ...]:
    """(B, N, H, d) for (B, H, N, d), so that heads join without a copy."""
    batch, heads, tokens, channels = tensor.shape
    return batch, tokens, heads, channels


def attention_layout(q: Tensor, starts: Tensor | None) -> tuple[int, ...]:
    """The same; packed rows, (T, H, d), lie so already."""
    return heads_last(q) if starts is None else tuple(q.shape)
