# SPDX-License-Identifier: MIT
"""The chains of torch ops of DynamicViT, EViT and DiffRate.

They have the ops of the authors' code in the same order: github.com/raoyongming/DynamicViT,
github.com/youweiliang/evit and github.com/OpenGVLab/DiffRate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-6  # DynamicViT's


class ImportancePlan(NamedTuple):
    """The first `kept` tokens stay; `joined` (B, N - kept, 1) is the one that each other token joins."""

    joined: Tensor
    kept: int

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        others, kept = x[:, self.kept :], x[:, : self.kept]
        return kept.scatter_reduce(-2, self.joined.expand(-1, -1, x.shape[-1]), others, reduce=mode)


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, policy: Tensor | None, importance: bool
) -> tuple[Tensor, ...]:
    """Return attention (B, N, C), and with `importance` the class token's attention weights (B, N).

    Sizes (B, N, 1) bias the scores as in DiffRate; `policy` (B, N) masks tokens as in DynamicViT.
    """
    weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if size is not None:
        weights = weights + size.log()[:, None, None, :, 0]
    weights = weights.softmax(dim=-1) if policy is None else _softmax_with_policy(weights, policy)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return (out, weights[:, :, 0].mean(1)) if importance else (out,)


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
    """Reduce x (B, N, C) to the class token, the `k` tokens with the highest scores, and the others fused."""
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
    """Return the numbers below `number` that a row of `index` lacks, by sorting zeros to the front."""
    every = torch.arange(number, device=index.device).expand(index.shape[0], -1)
    marked = torch.scatter(every, -1, index, 0)
    ordered, _ = torch.sort(marked, dim=-1, descending=False)
    return ordered[:, index.shape[1] :]


def importance_plan(metric: Tensor, kept: int, class_token: bool = True) -> tuple[ImportancePlan, Tensor]:
    """Run DiffRate's `get_merge_func` up to its closure, and return the similarities (B, N - kept) too."""
    with torch.no_grad():
        unit = metric / metric.norm(dim=-1, keepdim=True)
        others, important = unit[:, kept:], unit[:, :kept]
        similarity = others @ important.transpose(-1, -2)
        if class_token:
            similarity[..., :, 0] = -math.inf
        best, where = similarity.max(dim=-1)
    return ImportancePlan(where[..., None], kept), best
