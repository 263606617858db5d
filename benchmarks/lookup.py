# SPDX-License-Identifier: MIT
"""The cases of lookup attention: what their providers are given, what they run, what is right, what it must take.

As attention.py has it, with `r` compressed tokens that look up the N of the shape. A scatter is timed with the gather
before it, as a block runs them: they share their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import tokred_kernels as tk
from benchmarks.cases import LOOKUP_OPS, Case

HERE = LOOKUP_OPS
SUM = 4  # bytes of a lse
# Of (M, N) with d: a gather takes two forward and five backward (scores and the gradient of the weights among them), a
# scatter as many.
PRODUCTS, BACKWARD_PRODUCTS = 2, 5


@dataclass
class Inputs:
    """What all providers get: q, values (B, H, M, d), k, v (B, H, N, d); `grads` flow back, shaped as the outputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    values: Tensor
    grads: tuple[Tensor, ...] = ()

    @property
    def differentiable(self) -> list[Tensor]:
        """What gradients are asked of."""
        return [t for t in (self.q, self.k, self.v, self.values) if t.requires_grad]


def scatters(case: Case) -> bool:
    """Whether what was gathered goes back."""
    return case.op == "lookup_scatter"


def draw(case: Case, seed: int) -> Inputs:
    """Fresh random inputs, lying as projections leave them."""
    generator = torch.Generator(case.device).manual_seed(seed)
    batch, tokens = case.shape[:2]
    dtype = getattr(torch, case.dtype)

    def heads(rows: int) -> Tensor:
        drawn = torch.randn(batch, rows, case.heads, case.metric_dim, generator=generator, device=case.device)
        return drawn.to(dtype).transpose(1, 2).requires_grad_(case.training)

    inputs = Inputs(heads(case.r), heads(tokens), heads(tokens), heads(case.r))
    if not scatters(case):
        inputs.values.requires_grad_(False)
    if case.training:
        shapes = [inputs.q.shape, *([inputs.k.shape] if scatters(case) else [])]
        inputs.grads = tuple(torch.randn(shape, generator=generator, device=case.device).to(dtype) for shape in shapes)
    return inputs


def chain(case: Case) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[[Inputs], tuple[Tensor, ...]]]:
    """All weights in memory; no code is published, so this is what the paper's equations say in torch's ops."""

    def gather(q: Tensor, k: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        weights = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1)
        return (weights @ v, weights.transpose(-2, -1) @ values) if scatters(case) else (weights @ v,)

    return gather, lambda i: (i.q, i.k, i.v, i.values)


def ours(case: Case) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """The package's own calls."""

    def run(i: Inputs) -> tuple[Tensor, ...]:
        gathered, lse = tk.lookup_gather(i.q, i.k, i.v)
        return (gathered, tk.lookup_scatter(i.q, i.k, i.values, lse)) if scatters(case) else (gathered,)

    return run


def with_backward(forward: Callable[[Inputs], tuple[Tensor, ...]]) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """Forward and backward: the outputs, and the gradients of all inputs."""

    def run(i: Inputs) -> tuple[Tensor, ...]:
        outputs = forward(i)
        return (*(t.detach() for t in outputs), *torch.autograd.grad(outputs, i.differentiable, i.grads))

    return run


def expected(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """What is right: the reference in float64."""

    def exact(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad)

    parts = (exact(t) for t in (inputs.q, inputs.k, inputs.v, inputs.values))
    doubles = Inputs(*parts, tuple(g.double() for g in inputs.grads))
    run = with_backward(ours(case)) if case.training else ours(case)
    with tk.use_backend("reference"), torch.set_grad_enabled(case.training):
        return run(doubles)


def result_bytes(case: Case) -> int:
    """What is handed back: outputs, and gradients when training."""
    few, many = _rows(case)
    outputs = few + (many if scatters(case) else 0)
    gradients = few + 2 * many + (few if scatters(case) else 0)
    return outputs + (gradients if case.training else 0)


def least_bytes(case: Case) -> int:
    """Bytes that must pass between memory and chip: see traffic.py."""
    few, many = _rows(case)
    lse = SUM * case.shape[0] * case.heads * case.r
    forward = (few + 2 * many) + (few + lse)
    if scatters(case):
        forward += few + many  # q and k are at hand, were it one kernel
    return forward + (forward + result_bytes(case) if case.training else 0)


def operations(case: Case) -> int:
    """Floating-point operations of the products."""
    batch, tokens, channels = case.shape
    product = 2 * batch * case.r * tokens * channels
    uses = 2 if scatters(case) else 1
    return product * uses * (PRODUCTS + (BACKWARD_PRODUCTS if case.training else 0))


def _rows(case: Case) -> tuple[int, int]:
    """Bytes of M, and of N, rows of all heads."""
    batch, tokens, channels = case.shape
    row = batch * channels * torch.finfo(getattr(torch, case.dtype)).bits // 8
    return case.r * row, tokens * row
