# SPDX-License-Identifier: MIT
"""The cases of attention and pruning: what their providers are given, what they run, what is right, what it must take.

These take queries, keys and scores instead of a metric; the other modules hand over to this one by `HERE`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred_kernels as tk
from benchmarks import published_pruning as published
from benchmarks.cases import ATTENTION_OPS, Case

HERE = ATTENTION_OPS
LARGEST_SIZE = 4
KEPT = 0.7  # of the tokens, by a policy
FLOAT = 4  # bytes of a size, a policy, a score
INDEX = 4
# q, k, v and out take two products; the backward takes these again, as five.
PRODUCTS, BACKWARD_PRODUCTS = 2, 5


@dataclass
class Inputs:
    """What all providers get; None is what a case does not take.

    Shapes: q, k, v (B, H, N, d), views of one projection as in a model; size (B, N, 1) and policy, scores (B, N)
    float32; x (B, N, C). `grads` flow back, shaped as the outputs.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    size: Tensor | None = None
    policy: Tensor | None = None
    x: Tensor | None = None
    scores: Tensor | None = None
    grads: tuple[Tensor, ...] = ()

    @property
    def differentiable(self) -> list[Tensor]:
        """What gradients are asked of."""
        return [t for t in (self.q, self.k, self.v, self.policy) if t is not None and t.requires_grad]


def terms(case: Case) -> set[str]:
    """Of "size", "policy" and "class", those that a case of token_attention has."""
    return set(case.variant.split("+")) - {""}


def kept(case: Case) -> int:
    """How many tokens a case of pruning keeps besides the class token."""
    return case.shape[1] - 1 - case.r


def draw(case: Case, seed: int) -> Inputs:
    """Fresh random inputs."""
    generator = torch.Generator(case.device).manual_seed(seed)
    batch, tokens, channels = case.shape
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device)

    if case.op == "keep_topk":
        return Inputs(x=normal(batch, tokens, channels).to(dtype), scores=normal(batch, tokens).softmax(1))
    projected = normal(batch, tokens, 3, case.heads, case.metric_dim).to(dtype)
    inputs = Inputs(*(t.requires_grad_(case.training) for t in projected.permute(2, 0, 3, 1, 4).unbind(0)))
    if "size" in terms(case):
        inputs.size = torch.randint(
            1, LARGEST_SIZE + 1, (batch, tokens, 1), generator=generator, device=case.device
        ).float()
    if "policy" in terms(case):
        drawn = torch.rand(batch, tokens, generator=generator, device=case.device)
        inputs.policy = (drawn < KEPT).float().requires_grad_(case.training)
    if case.training:
        worth = (normal(batch, tokens),) if "class" in terms(case) else ()
        inputs.grads = (normal(batch, tokens, channels).to(dtype), *worth)
    return inputs


def chain(case: Case) -> tuple[Callable[..., Any], Callable[[Inputs], tuple[Any, ...]]]:
    """The published chain as a function of tensors, and the arguments it takes."""
    if case.op == "keep_topk":
        k = kept(case)
        return lambda x, scores: (published.keep_attentive(x, scores, k),), lambda i: (i.x, i.scores)
    importance = "class" if "class" in terms(case) else ""

    def attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, policy: Tensor | None) -> tuple[Tensor, ...]:
        return published.attention(q, k, v, size, policy, importance)

    return attention, lambda i: (i.q, i.k, i.v, None if i.size is None else i.size.to(i.q.dtype), i.policy)


def ours(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The package's own call."""
    if case.op == "keep_topk":
        return lambda i: tk.nn.keep_attentive(i.x, i.scores, kept(case))[:1]
    importance = "class" if "class" in terms(case) else None

    def attention(i: Inputs) -> tuple[Tensor, ...]:
        result = tk.token_attention(i.q, i.k, i.v, size=i.size, policy=i.policy, importance=importance)
        out, *worth = result if isinstance(result, tuple) else (result,)
        return out.transpose(1, 2).flatten(2), *worth

    return attention


def fused(i: Inputs) -> tuple[Tensor, ...]:
    """torch's own fused attention, with neither sizes, policy nor importance: no more than a yardstick."""
    return (F.scaled_dot_product_attention(i.q, i.k, i.v).transpose(1, 2).flatten(2),)


def flex(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]] | None:
    """FlexAttention with the same bias; None where it does not serve.

    It gives no importance, so that gradients where importance has a part are others than its own, and has no policy.
    """
    of_importance = case.training and "class" in terms(case)
    if case.device != "cuda" or "size" not in terms(case) or "policy" in terms(case) or of_importance:
        return None
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415  (its import compiles)

    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(i: Inputs) -> tuple[Tensor, ...]:
        bias = i.size[..., 0].log()
        out = compiled(i.q, i.k, i.v, score_mod=lambda score, b, h, q, kv: score + bias[b, kv])
        return (out.transpose(1, 2).flatten(2),)

    return attention


def with_backward(forward: Callable[[Inputs], tuple[Tensor, ...]]) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Forward and backward: the outputs, and the gradients of all that has one, of as many outputs as there are."""

    def run(i: Inputs) -> tuple[Tensor, ...]:
        outputs = forward(i)
        wanted = [t for t in i.differentiable if len(outputs) == len(i.grads) or t is not i.policy]
        gradients = torch.autograd.grad(outputs, wanted, i.grads[: len(outputs)], allow_unused=True)
        return tuple(t.detach() for t in outputs) + gradients

    return run


def expected(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """What is right: the reference in float64."""

    def exact(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    doubles = Inputs(*(exact(getattr(inputs, name)) for name in ("q", "k", "v", "size", "policy", "x", "scores")))
    doubles.grads = tuple(g.double() for g in inputs.grads)
    run = with_backward(ours(case)) if case.training else ours(case)
    with tk.use_backend("reference"), torch.set_grad_enabled(case.training):
        return run(doubles)


def least_bytes(case: Case) -> int:
    """Bytes that must pass between memory and chip: see traffic.py."""
    batch, tokens, channels = case.shape
    item = torch.finfo(getattr(torch, case.dtype)).bits // 8
    row = batch * tokens * channels * item
    if case.op == "keep_topk":
        slots = batch * (kept(case) + 2)
        views = INDEX * (2 * batch * tokens + 2 * slots)
        return row + FLOAT * batch * tokens + views + slots * channels * item
    per_token = FLOAT * batch * tokens * len(terms(case))
    forward = 4 * row + per_token
    # Backward: q, k, v, out and its gradient in, three gradients out.
    return forward + (8 * row + per_token if case.training else 0)


def operations(case: Case) -> int:
    """Floating-point operations of the products."""
    if case.op == "keep_topk":
        return 0
    batch, tokens, channels = case.shape
    products = PRODUCTS + (BACKWARD_PRODUCTS if case.training else 0)
    return products * 2 * batch * tokens * tokens * channels
