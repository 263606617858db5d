# SPDX-License-Identifier: MIT
"""The attention that patched models run: torch's own fused kernel, with token sizes as a key bias."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def size_bias(size: Tensor, like: Tensor) -> Tensor:
    """`log size` as a bias on keys, (B, 1, 1, N) in `like`'s dtype, from sizes (B, N, 1).

    It stays a row: scaled_dot_product_attention broadcasts it over heads and queries without a copy, so proportional
    attention costs O(B N) memory, not the O(B H N^2) of a bias added to explicit scores.
    """
    return size.log().transpose(1, 2).unsqueeze(1).to(like.dtype)


def proportional_attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, *, dropout: float = 0.0, fused: bool = True
) -> Tensor:
    """`softmax(q k^T / sqrt(d) + log size) v`: a key counts as often as the tokens it stands for (ToMe, section 3.2).

    Args:
        q, k, v: (B, H, N, d).
        size: (B, N, 1), how many first tokens each token stands for; None for 1 each, which needs no bias at all.
        dropout: the probability with which attention weights are dropped; 0 when evaluating.
        fused: False writes the weights out, (B, H, N, N), step by step as timm does where its fused attention is off.

    Returns:
        (B, H, N, d).
    """
    bias = None if size is None else size_bias(size, q)
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return F.dropout(scores.softmax(dim=-1), dropout) @ v
