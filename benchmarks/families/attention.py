# SPDX-License-Identifier: MIT
"""Attention with sizes, a policy and importance, and EViT's pruning by importance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred_kernels as tk
from benchmarks.baselines import pruning
from benchmarks.harness.case import FLOAT32, Case, Target, map_bytes
from benchmarks.harness.inputs import normal, sizes

KEPT = 0.7  # share of the tokens that a policy keeps
# Matrix products of the forward pass; the backward pass recomputes one and adds four.
PRODUCTS, BACKWARD_PRODUCTS = 2, 5


@dataclass(frozen=True)
class AttentionCase(Case):
    """Token attention on q, k, v (B, H, N, d), which are views of one projection as in a model."""

    @property
    def terms(self) -> set[str]:
        """Those of "size", "policy" and "class" that the case has."""
        return set(self.variant.split("+"))

    @property
    def label(self) -> str:
        passes = ", forward and backward" if self.training else ""
        return f"({self.shape[0]}, {self.heads}, {self.shape[1]}, {self.metric_dim}), {self.variant}{passes}"

    def draw(self, seed: int) -> SimpleNamespace:
        batch, tokens, channels = self.shape
        draw, dtype = normal(self, seed), self.torch_dtype
        projected = draw(batch, tokens, 3, self.heads, self.metric_dim).to(dtype).permute(2, 0, 3, 1, 4)
        q, k, v = (part.requires_grad_(self.training) for part in projected.unbind(0))
        size = sizes(self, seed) if "size" in self.terms else None
        policy = None
        if "policy" in self.terms:
            policy = (draw(batch, tokens).sigmoid() < KEPT).float().requires_grad_(self.training)
        inputs = SimpleNamespace(q=q, k=k, v=v, size=size, policy=policy)
        inputs.size_as_x = None if size is None else size.to(dtype)
        if self.training:
            inputs.leaves = ("q", "k", "v") + (("policy",) if policy is not None else ())
            importance = (draw(batch, tokens),) if "class" in self.terms else ()
            inputs.grads = (draw(batch, tokens, channels).to(dtype), *importance)
        return inputs

    def baseline(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        """Return attention with all weights in memory."""
        importance = "class" in self.terms
        return lambda *tensors: pruning.attention(*tensors, importance), ("q", "k", "v", "size_as_x", "policy")

    def yardsticks(self) -> dict[str, Callable[[SimpleNamespace], Any]]:
        """Return plain SDPA, and on a GPU FlexAttention with the same sizes if it computes the same gradients."""
        found: dict[str, Callable[[SimpleNamespace], Any]] = {
            "fused": lambda i: _heads_last(F.scaled_dot_product_attention(i.q, i.k, i.v))
        }
        same_gradients = not (self.training and "class" in self.terms)
        if self.device == "cuda" and same_gradients and self.terms in ({"size"}, {"size", "class"}):
            found["flex"] = _flex()
        return found

    def ours(self, inputs: SimpleNamespace) -> tuple[Tensor, ...]:
        importance = "class" if "class" in self.terms else None
        settings: dict[str, Any] = {"size": inputs.size, "policy": inputs.policy, "importance": importance}
        result = tk.token_attention(inputs.q, inputs.k, inputs.v, **settings)
        out, *rest = result if isinstance(result, tuple) else (result,)
        return _heads_last(out), *rest

    def least_bytes(self) -> int:
        """Return the bytes of q, k, v, out and the vectors; in the backward pass of out, its gradient and five more."""
        batch, tokens, channels = self.shape
        row, vectors = batch * tokens * channels * self.item, FLOAT32 * batch * tokens * len(self.terms)
        return 4 * row + vectors + (8 * row + vectors if self.training else 0)

    def operations(self) -> int:
        batch, tokens, channels = self.shape
        products = PRODUCTS + (BACKWARD_PRODUCTS if self.training else 0)
        return products * 2 * batch * tokens * tokens * channels


@dataclass(frozen=True)
class PruneCase(Case):
    """Keep the most important tokens and fuse the `r` others into one."""

    @property
    def kept(self) -> int:
        """Number of tokens that stay, without the class token."""
        return self.shape[1] - 1 - self.r

    @property
    def label(self) -> str:
        return f"{self.shape}, {self.r} fused"

    def draw(self, seed: int) -> SimpleNamespace:
        """Return random tokens and scores that sum to 1."""
        draw = normal(self, seed)
        return SimpleNamespace(x=draw(*self.shape).to(self.torch_dtype), scores=draw(*self.shape[:2]).softmax(1))

    def baseline(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        """Return EViT's chain."""
        return lambda x, scores: pruning.keep_attentive(x, scores, self.kept), ("x", "scores")

    def ours(self, inputs: SimpleNamespace) -> Tensor:
        return tk.nn.keep_attentive(inputs.x, inputs.scores, self.kept)[0]

    def slots(self) -> int:
        return self.kept + 2

    def least_bytes(self) -> int:
        """Return the bytes of the tokens, the scores, the map and the output."""
        batch, tokens, channels = self.shape
        moved = batch * (tokens + self.slots()) * channels * self.item
        return moved + FLOAT32 * batch * tokens + map_bytes(batch, tokens, self.slots())


def _heads_last(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)


def _flex() -> Callable[[SimpleNamespace], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415  (its import compiles)

    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(i: SimpleNamespace) -> Tensor:
        bias = i.size[..., 0].log()
        return _heads_last(compiled(i.q, i.k, i.v, score_mod=lambda score, b, h, q, kv: score + bias[b, kv]))

    return attention


DEIT_S, VIT_B_384, VIT_B_384_64 = (8, 197, 384), (2, 577, 768), (64, 577, 768)
BF16 = "bfloat16"
NO_SLOWER_THAN_SDPA = (Target("times_fused", 1),)
POLICY = (Target("speedup", 2), Target("peak_share", 1 / 3))
GPU = (Target("times_fused", 1.25), Target("speedup", 3))
GPU_TRAINING = (Target("times_fused", 1.4),)


def _case(model: str, shape: tuple[int, int, int], heads: int, variant: str, *where: str, **rest: Any) -> AttentionCase:
    return AttentionCase("token_attention", model, shape, 0, *where, heads=heads, variant=variant, **rest)


CASES = (
    PruneCase("keep_topk", "deit_small", DEIT_S, 58, "cpu", quick=True, targets=(Target("speedup", 3),)),
    PruneCase("keep_topk", "vit_base", (8, 197, 768), 58, "cpu", BF16),
    _case("deit_small", DEIT_S, 6, "policy", "cpu"),
    _case("deit_small", DEIT_S, 6, "policy", "cpu", training=True, quick=True, targets=POLICY),
    _case("deit_small", DEIT_S, 6, "size", "cpu", quick=True, targets=NO_SLOWER_THAN_SDPA),
    # The smallest sizes at which `auto` prefers our CPU kernel to SDPA.
    _case("long", (8, 160, 384), 6, "size", "cpu"),
    _case("ragged", (8, 97, 384), 6, "size", "cpu"),
    _case("ragged_narrow", (8, 129, 384), 12, "size", "cpu", metric_dim=32),
    _case("deit_small", DEIT_S, 6, "class", "cpu", quick=True),
    _case("vit_base_384", VIT_B_384, 12, "size+class", "cpu"),
    _case("deit_small", DEIT_S, 6, "policy", "cpu", BF16, training=True),
    _case("deit_small", DEIT_S, 6, "size+class", "cpu", BF16, quick=True, targets=NO_SLOWER_THAN_SDPA),
    PruneCase("keep_topk", "deit_small", (64, 197, 384), 58, "cuda", BF16, quick=True),
    _case("vit_base_384", VIT_B_384_64, 12, "size+class", "cuda", BF16, quick=True, targets=GPU),
    _case("vit_base_384", VIT_B_384_64, 12, "size+class", "cuda", BF16, training=True, quick=True,
          targets=GPU_TRAINING),
    _case("vit_base_384", VIT_B_384_64, 12, "policy", "cuda", BF16, training=True),
)  # fmt: skip
