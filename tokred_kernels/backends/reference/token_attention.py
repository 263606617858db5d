# SPDX-License-Identifier: MIT
"""Token attention with all weights in memory, (B, H, N, N): what the fused kernels must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.token_map import Packing

POLICY_EPS = 1e-6  # DynamicViT's, models/dyvit.py: keeps rows of dropped keys finite


def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    policy: Tensor | None,
    packed: Packing | None,
    scale: float,
    importance: str,
) -> tuple[Tensor, Tensor]:
    """See `ops.token_attention`: the output and the importance, which is empty where none is asked for."""
    if packed is None:
        return _attend(q, k, v, bias, policy, scale, importance)
    lengths = list(packed.lengths)
    pieces = []
    for image in zip(*([None] * len(lengths) if t is None else t.split(lengths) for t in (q, k, v, bias, policy))):
        heads_first = (t.transpose(0, 1)[None] for t in image[:3])
        terms = (None if t is None else t[None] for t in image[3:])
        out, worth = _attend(*heads_first, *terms, scale, importance)
        pieces.append((out[0].transpose(0, 1), worth[0] if importance else worth))
    if not pieces:
        return torch.empty_like(q), q.new_empty(0)
    return torch.cat([out for out, _ in pieces]), torch.cat([worth for _, worth in pieces])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, policy: Tensor | None, scale: float, importance: str
) -> tuple[Tensor, Tensor]:
    accumulator = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(accumulator) @ k.to(accumulator).transpose(-2, -1)) * scale
    if bias is not None:
        scores = scores + bias[:, None, None, :]
    weights = scores.softmax(-1) if policy is None else policy_softmax(scores, policy)
    out = (weights @ v.to(accumulator)).to(q.dtype)
    if importance == "class":
        return out, weights[:, :, 0].mean(1)
    if importance == "mean":
        return out, weights.mean((1, 2))
    if importance == "last":
        return out, weights[:, :, -1].mean(1)
    return out, weights.new_empty(0)


def policy_softmax(scores: Tensor, policy: Tensor) -> Tensor:
    """The softmax of scores (B, H, N, N) over keys that are kept, policy (B, N): a query always sees itself.

    (DynamicViT, section 3.3, equations 10 and 11, with the published code's eps.)
    """
    tokens = scores.shape[-1]
    seen = policy[:, None, None, :].to(scores.dtype)
    seen = seen + (1 - seen) * torch.eye(tokens, dtype=scores.dtype, device=scores.device)
    kept = (scores - scores.max(-1, keepdim=True).values).exp() * seen
    return (kept + POLICY_EPS / tokens) / (kept.sum(-1, keepdim=True) + POLICY_EPS)
