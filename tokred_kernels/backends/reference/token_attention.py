# SPDX-License-Identifier: MIT
"""Token attention with all weights in memory, (B, H, N, N): what the fused kernels must equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokred_kernels.backends.reference import product
from tokred_kernels.dtypes import accumulator_of
from tokred_kernels.packing import Packing

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
    """See `ops.token_attention`: the output and the importance, which is empty without `importance`."""
    if packed is None:
        return _attend(q, k, v, bias, policy, scale, importance)
    lengths = list(packed.lengths)
    pieces = []
    columns: list[Any] = [[None] * len(lengths) if t is None else t.split(lengths) for t in (q, k, v, bias, policy)]
    for *operands, image_bias, image_policy in zip(*columns, strict=True):
        query, key, value = (t.transpose(0, 1)[None] for t in operands)
        terms = [None if t is None else t[None] for t in (image_bias, image_policy)]
        out, importance_out = _attend(query, key, value, terms[0], terms[1], scale, importance)
        pieces.append((out[0].transpose(0, 1), importance_out[0] if importance else importance_out))
    if not pieces:
        return torch.empty_like(q), q.new_empty(0)
    return torch.cat([out for out, _ in pieces]), torch.cat([importance_out for _, importance_out in pieces])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, policy: Tensor | None, scale: float, importance: str
) -> tuple[Tensor, Tensor]:
    weights = attention_weights(q, k, bias, policy, scale)
    out = product(weights, v.to(weights.dtype)).to(q.dtype)
    return out, importance_of(weights, importance) if importance else weights.new_empty(0)


def attention_weights(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    policy: Tensor | None,
    scale: float,
    multiply: Callable[[Tensor, Tensor], Tensor] = product,
) -> Tensor:
    """Return (B, H, N, N) in float32, or float64 for float64. `multiply` is the matrix product of the scores."""
    accumulator = accumulator_of(q)
    scores = multiply(q.to(accumulator), k.to(accumulator).transpose(-2, -1)) * scale
    if bias is not None:
        scores = scores + bias[:, None, None, :]
    return scores.softmax(-1) if policy is None else policy_softmax(scores, policy)


def importance_of(weights: Tensor, importance: str) -> Tensor:
    """(B, N) from the weights (B, H, N, N); see `ops.token_attention`."""
    if importance == "mean" or weights.shape[-1] == 0:
        return weights.mean((1, 2))
    return weights[:, :, 0 if importance == "class" else -1].mean(1)


def policy_softmax(scores: Tensor, policy: Tensor) -> Tensor:
    """The softmax of scores (B, H, N, N) over keys that are kept, policy (B, N): a query always sees itself.

    (DynamicViT, section 3.3, equations 10 and 11, with the published code's eps.)
    """
    tokens = scores.shape[-1]
    seen = policy[:, None, None, :].to(scores.dtype)
    seen = seen + (1 - seen) * torch.eye(tokens, dtype=scores.dtype, device=scores.device)
    if tokens == 0:  # no score is the highest of none
        return scores * seen
    kept = (scores - scores.max(-1, keepdim=True).values).exp() * seen
    return (kept + POLICY_EPS / tokens) / (kept.sum(-1, keepdim=True) + POLICY_EPS)
