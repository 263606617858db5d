# SPDX-License-Identifier: MIT
"""The memory layout of attention results."""

from __future__ import annotations

from torch import Tensor


def heads_last(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape (B, N, H, d) for a tensor (B, H, N, d): heads then join without a copy."""
    batch, heads, tokens, channels = tensor.shape
    return batch, tokens, heads, channels


def attention_layout(q: Tensor, starts: Tensor | None) -> tuple[int, ...]:
    """Return `heads_last(q)`, or the shape of packed rows (T, H, d), which have this layout."""
    return heads_last(q) if starts is None else tuple(q.shape)
