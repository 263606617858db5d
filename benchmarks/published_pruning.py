# SPDX-License-Identifier: MIT
"""The chains of torch ops that DynamicViT, EViT and DiffRate publish, in our own words, as published.py has ToMe's.

Same ops in the same order as the papers' code: github.com/raoyongming/DynamicViT, github.com/youweiliang/evit and
github.com/OpenGVLab/DiffRate.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6  # DynamicViT's


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, policy: Tensor | None, importance: str
) -> tuple[Tensor, ...]:
    """Attention with all weights in memory: sizes (B, N, 1) as DiffRate adds them, `policy` (B, N) as DynamicViT does.

    Returns (B, N, C), and the class token's attention (B, N) where `importance` is "class".
    """
    weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if size is not None:
        weights = weights + size.log()[:, None, None, :, 0]
    weights = weights.softmax(dim=-1) if policy is None else _softmax_with_policy(weights, policy)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return (out, weights[:, :, 0].mean(1)) if importance == "class" else (out,)


def _softmax_with_policy(scores: Tensor, policy: Tensor) -> Tensor:
    batch, tokens = policy.shape
    seen = policy.reshape(batch, 1, 1, tokens)
    seen = seen + (1.0 - seen) * torch.eye(tokens, dtype=seen.dtype, device=seen.device).view(1, 1, tokens, tokens)
    highest = torch.max(scores, dim=-1, keepdim=True)[0]
    scores = scores - highest
    weights = scores.to(torch.float32).exp_() * seen.to(torch.float32)
    weights = (weights + EPS / tokens) / (weights.sum(dim=-1, keepdim=True) + EPS)
    return weights.type_as(highest)


def keep_attentive(x: Tensor, scores: Tensor, k: int) -> Tensor:
    """EViT's reduction: x (B, N, C) with scores (B, N), the class token first, to (B, k + 2, C), the others fused."""
    tokens, channels = x.shape[1:]
    scores, patches = scores[:, 1:], x[:, 1:]
    _, kept = torch.topk(scores, k, dim=1, largest=True, sorted=True)
    others = _complement(kept, tokens - 1)
    stay = patches.gather(1, kept[..., None].expand(-1, -1, channels))
    leave = patches.gather(1, others[..., None].expand(-1, -1, channels))
    weight = scores.gather(1, others)
    fused = torch.sum(leave * weight[..., None], dim=1, keepdim=True)
    return torch.cat([x[:, 0:1], stay, fused], dim=1)


def _complement(index: Tensor, number: int) -> Tensor:
    """The numbers below `number` that are not in each row of `index`, by sorting zeros to the front."""
    every = torch.arange(number, device=index.device).expand(index.shape[0], -1)
    marked = torch.scatter(every, -1, index, 0)
    ordered, _ = torch.sort(marked, dim=-1, descending=False)
    return ordered[:, index.shape[1] :]
