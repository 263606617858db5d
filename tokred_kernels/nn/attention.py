# SPDX-License-Identifier: MIT
"""The attention that patched models run: torch's own fused kernel, with token sizes as a key bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred_kernels.token_map import Packing


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


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    size: Tensor | None = None,
    *,
    dropout: float = 0.0,
    fused: bool = True,
) -> Tensor:
    """`proportional_attention` of packed tokens: those of an image attend to those of the same image.

    Args:
        q, k, v: (T, H, d), T the tokens of all images, as variable-length attention takes them.
        packing: where each image starts.
        size: (T, 1), how many first tokens each token stands for; None for 1 each.
        dropout, fused: as in `proportional_attention`.

    Returns:
        (T, H, d).

    One call of torch's attention an image: no padding and no masks, but B launches, which a GPU feels where images are
    small. A single kernel for all of them belongs in its place.
    """
    if not packing.lengths:
        return torch.empty_like(v)
    images = zip(*(part.split(packing.lengths) for part in (q, k, v)), strict=True)
    sizes = [None] * len(packing.lengths) if size is None else [own[None] for own in size.split(packing.lengths)]
    results = []
    for image, own in zip(images, sizes, strict=True):
        query, key, value = (part.transpose(0, 1)[None] for part in image)
        y = proportional_attention(query, key, value, own, dropout=dropout, fused=fused)
        results.append(y[0].transpose(0, 1))
    return torch.cat(results)
