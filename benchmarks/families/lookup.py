# SPDX-License-Identifier: MIT
"""LookupViT's attention: `r` compressed tokens gather from N tokens, and scatter back with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

import tokred_kernels as tk
from benchmarks.harness.case import FLOAT32, Case, Target
from benchmarks.harness.inputs import normal

# Matrix products of a gather, and of a scatter; the backward pass recomputes one and adds four.
PRODUCTS, BACKWARD_PRODUCTS = 2, 5


@dataclass(frozen=True)
class LookupCase(Case):
    """A gather; a scatter is timed with the gather before it, as a block runs them."""

    @property
    def scatters(self) -> bool:
        return self.op == "lookup_scatter"

    @property
    def label(self) -> str:
        ops = "gather and scatter" if self.scatters else "gather"
        passes = ", forward and backward" if self.training else ""
        return f"({self.shape[0]}, {self.heads}, {self.r} of {self.shape[1]}, {self.metric_dim}), {ops}{passes}"

    def draw(self, seed: int) -> SimpleNamespace:
        """Return q, values (B, H, r, d) and k, v (B, H, N, d), with the strides of projections."""
        draw = normal(self, seed)

        def rows(number: int) -> Tensor:
            drawn = draw(self.shape[0], number, self.heads, self.metric_dim).to(self.torch_dtype)
            return drawn.transpose(1, 2).requires_grad_(self.training)

        tokens = self.shape[1]
        inputs = SimpleNamespace(q=rows(self.r), k=rows(tokens), v=rows(tokens), values=rows(self.r))
        if self.training:
            inputs.leaves = ("q", "k", "v") + (("values",) if self.scatters else ())
            shapes = (self.r, tokens) if self.scatters else (self.r,)
            inputs.grads = tuple(rows(number).detach() for number in shapes)
        return inputs

    def baseline(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        """Return the paper's equations in torch ops, with all weights in memory: no code is published."""

        def attention(q: Tensor, k: Tensor, v: Tensor, values: Tensor) -> tuple[Tensor, ...]:
            weights = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1)
            return (weights @ v, weights.transpose(-2, -1) @ values) if self.scatters else (weights @ v,)

        return attention, ("q", "k", "v", "values")

    def ours(self, inputs: SimpleNamespace) -> tuple[Tensor, ...]:
        gathered, lse = tk.lookup_gather(inputs.q, inputs.k, inputs.v)
        if not self.scatters:
            return (gathered,)
        return gathered, tk.lookup_scatter(inputs.q, inputs.k, inputs.values, lse)

    def result_bytes(self) -> int:
        """Return the bytes of outputs and gradients."""
        few, many = self._row_bytes()
        outputs = few + (many if self.scatters else 0)
        gradients = few + 2 * many + (few if self.scatters else 0)
        return outputs + (gradients if self.training else 0)

    def least_bytes(self) -> int:
        """Return the lower bound on memory traffic, as if gather and scatter were one kernel."""
        few, many = self._row_bytes()
        forward = 2 * few + 2 * many + FLOAT32 * self.shape[0] * self.heads * self.r
        if self.scatters:
            forward += few + many
        return forward + (forward + self.result_bytes() if self.training else 0)

    def operations(self) -> int:
        batch, tokens, channels = self.shape
        products = PRODUCTS + (BACKWARD_PRODUCTS if self.training else 0)
        return 2 * batch * self.r * tokens * channels * products * (2 if self.scatters else 1)

    def _row_bytes(self) -> tuple[int, int]:
        row = self.shape[0] * self.shape[2] * self.item
        return self.r * row, self.shape[1] * row


BF16 = "bfloat16"
NO_SLOWER = (Target("speedup", 1),)
WORKING_MEMORY = Target("working_share", 0.1)


def _case(op: str, batch: int, *where: str, **rest: Any) -> LookupCase:
    """Return a case of LookupViT-B at 1024 x 1024."""
    return LookupCase(op, "lookupvit_base", (batch, 4096, 768), 100, *where, heads=12, **rest)


CASES = (
    _case("lookup_gather", 2, "cpu"),
    _case("lookup_scatter", 2, "cpu", quick=True, targets=(Target("speedup", 1.3), WORKING_MEMORY)),
    _case("lookup_scatter", 2, "cpu", training=True, quick=True, targets=(Target("speedup", 2), WORKING_MEMORY)),
    _case("lookup_scatter", 2, "cpu", BF16, quick=True, targets=NO_SLOWER),
    _case("lookup_scatter", 2, "cpu", BF16, training=True, quick=True, targets=NO_SLOWER),
    _case("lookup_scatter", 16, "cuda", BF16, quick=True, quick_compile=True,
          targets=(Target("speedup", 2), Target("speedup_compiled", 1.3))),
    _case("lookup_scatter", 16, "cuda", BF16, training=True, quick=True, targets=(Target("speedup", 1.8),)),
    _case("lookup_gather", 16, "cuda", BF16),
)  # fmt: skip
