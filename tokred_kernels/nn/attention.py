# SPDX-License-Identifier: MIT
"""The attention of patched models: `token_attention`, or explicit weights if dropout applies to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred_kernels.backends.reference.token_attention import attention_weights, importance_of
from tokred_kernels.backends.torch_attention import key_bias, torchs_attention
from tokred_kernels.dtypes import autocasted
from tokred_kernels.ops.token_attention import token_attention
from tokred_kernels.packing import Packing


def size_bias(size: Tensor, like: Tensor) -> Tensor:
    """Return the attention bias (B, 1, 1, N) of sizes (B, N, 1), their logarithm, in the dtype of `like`."""
    return key_bias(size.log().squeeze(2), like)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: Tensor | None = None,
    policy: Tensor | None = None,
    importance: str | None = None,
    packed: Packing | None = None,
    dropout: float = 0.0,
    fused: bool = True,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute `token_attention` with the additional options of timm's attention.

    Args:
        q, k, v, size, policy, importance, packed: see `token_attention`.
        dropout: the probability of dropping an attention weight; 0 in evaluation.
        fused: False materializes the weights (B, H, N, N), like timm without fused attention.
        drop: the module that drops weights with probability `dropout`. It is called on all materialized weights, so
            that its hooks see them. Default `torch.nn.functional.dropout`.

    Returns:
        (B, H, N, d), or (T, H, d) if packed, and the importance (B, N), or (T,), or None. The importance is that of the
        weights before dropout.
    """
    if fused and dropout == 0.0:
        out = token_attention(q, k, v, size=size, policy=policy, importance=importance, packed=packed)
        return out if isinstance(out, tuple) else (out, None)
    if packed is not None:
        return _each_image(
            q, k, v, size, policy, packed, importance=importance, dropout=dropout, fused=fused, drop=drop
        )
    size, policy = (None if t is None else t.reshape(q.shape[0], q.shape[2]) for t in (size, policy))
    if fused and policy is None and importance is None:
        q, k, v = autocasted(q, k, v)
        return torchs_attention(q, k, v, None if size is None else size.log(), dropout_p=dropout), None
    bias = None if size is None else size.to(torch.promote_types(q.dtype, size.dtype)).log()
    weights = attention_weights(q, k, bias, policy, q.shape[-1] ** -0.5, torch.matmul)
    ranking = None if importance is None else importance_of(weights, importance)
    weights = weights.to(v.dtype)
    return (F.dropout(weights, dropout) if drop is None else drop(weights)) @ v, ranking


def _each_image(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    policy: Tensor | None,
    packed: Packing,
    *,
    importance: str | None,
    dropout: float,
    fused: bool,
    drop: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """Compute `attend` for packed tokens (T, H, d), image by image."""
    lengths = [length for length in packed.lengths if length]  # without images that have no tokens
    if not lengths:
        return torch.empty_like(v), None if importance is None else q.new_empty(0, dtype=torch.float32)
    columns: list[Any] = [part.split(lengths) for part in (q, k, v)]
    columns += [[None] * len(lengths) if t is None else t.split(lengths) for t in (size, policy)]
    outputs, importances = [], []
    for query, key, value, *terms in zip(*columns, strict=True):
        heads_first = (part.transpose(0, 1)[None] for part in (query, key, value))
        own_size, own_policy = (None if t is None else t[None] for t in terms)
        wanted: Any = {"size": own_size, "policy": own_policy, "importance": importance}
        y, ranking = attend(*heads_first, **wanted, dropout=dropout, fused=fused, drop=drop)
        outputs.append(y[0].transpose(0, 1))
        importances.append(ranking)
    joined = None if importance is None else torch.cat([own[0] for own in importances if own is not None])
    return torch.cat(outputs), joined
