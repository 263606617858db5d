# SPDX-License-Identifier: MIT
"""Merge and unmerge on a given token map, composition of maps, and a map's CSR view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor

import tokred_kernels as tk
from benchmarks.baselines import tome
from benchmarks.harness.case import FLOAT32, INT32, Case, Target, map_bytes
from benchmarks.harness.inputs import normal, sizes


@dataclass(frozen=True)
class MergeCase(Case):
    """An op on ToMe's map of `r` merged tokens."""

    @property
    def label(self) -> str:
        shape = self.shape[:2] if self.op in ("then", "to_csr") else self.shape
        return f"({', '.join(map(str, shape))}), r {self.r}"

    def draw(self, seed: int) -> SimpleNamespace:
        """Return random tokens, and a map both as ours and as the baseline's plan."""
        batch, tokens, channels = self.shape
        draw, out, dtype = normal(self, seed), self.slots(), self.torch_dtype
        plan = tome.bipartite_plan(draw(batch, tokens, self.metric_dim).to(dtype), self.r, class_token=True)
        inputs = SimpleNamespace(
            x=draw(batch, tokens, channels).to(dtype),
            y=draw(batch, out, channels).to(dtype),
            size=sizes(self, seed),
            plan=plan,
            token_map=tome.token_map(plan, tokens),
        )
        inputs.size_as_x = inputs.size.to(dtype)
        inputs.token_map.views()  # selectors build both views, so their cost is not part of a merge
        if self.training:
            moved, result = ("y", tokens) if self.op == "unmerge" else ("x", out)
            getattr(inputs, moved).requires_grad_()
            inputs.leaves, inputs.grads = (moved,), (draw(batch, result, channels).to(dtype),)
        if self.op == "then":
            inputs.second_plan = tome.bipartite_plan(draw(batch, out, self.metric_dim), self.r, class_token=True)
            inputs.second_map = tome.token_map(inputs.second_plan, out)
            inputs.source = tome.merge_source(plan.merge, inputs.x)
        return inputs

    def baseline(self) -> tuple[Callable[..., Any], tuple[str, ...]] | None:
        """Return ToMe's chain; none was published for the CSR view."""
        return {
            "merge": (lambda p, x: p.merge(x, self.variant), ("plan", "x")),
            "merge_wavg": (lambda p, x, size: tome.merge_wavg(p.merge, x, size), ("plan", "x", "size_as_x")),
            "unmerge": (lambda p, y: p.unmerge(y), ("plan", "y")),
            "then": (lambda p, y, source: tome.merge_source(p.merge, y, source), ("second_plan", "y", "source")),
        }.get(self.op)

    def yardsticks(self) -> dict[str, Callable[[SimpleNamespace], Any]]:
        if self.training or self.op in ("then", "to_csr"):
            return {}
        return {"clone": lambda i: (i.y if self.op == "unmerge" else i.x).clone()}

    def ours(self, inputs: SimpleNamespace) -> Any:
        token_map = inputs.token_map
        return {
            "merge": lambda: tk.merge(inputs.x, token_map, reduce=self.variant),
            "merge_wavg": lambda: tk.merge_wavg(inputs.x, token_map, inputs.size),
            "unmerge": lambda: tk.unmerge(inputs.y, token_map),
            "then": lambda: token_map.then(inputs.second_map),
            "to_csr": lambda: tk.TokenMap._trusted(token_map.dest, token_map.num_out).views(),
        }[self.op]()

    def values(self, output: Any) -> tuple[Any, ...]:
        """Return `dest` of composed maps: the baseline computes a dense (B, N', N) matrix."""
        if self.op == "then":
            return (output.argmax(1) if isinstance(output, Tensor) else output.dest,)
        return super().values(output)

    def least_bytes(self) -> int:
        batch, tokens, channels = self.shape
        out = self.slots()
        x, y = batch * tokens * channels * self.item, batch * out * channels * self.item
        dest, csr, size = INT32 * batch * tokens, INT32 * batch * (tokens + 2 * out), FLOAT32 * batch * (tokens + out)
        if self.op == "to_csr":
            return map_bytes(batch, tokens, out)
        if self.op == "then":  # two maps in, one out
            return 2 * dest + INT32 * batch * out
        merging, spreading = x + csr + y, y + dest + x
        if self.op == "unmerge":
            return spreading + (merging if self.training else 0)
        weights = size if self.op == "merge_wavg" else 2 * INT32 * batch * out  # the backward of a mean needs counts
        forward = merging + (size if self.op == "merge_wavg" else 0)
        return forward + (spreading + weights if self.training else 0)


DEIT_S, VIT_B, VIT_L_384 = (8, 197, 384), (8, 197, 768), (4, 577, 1024)
UNET_64 = (2, 4096, 320)  # Stable Diffusion 1.5's first blocks at 512 x 512, with guidance
DEIT_S_64, VIT_L_384_256 = (64, 197, 384), (256, 577, 1024)
BF16, FP16 = "bfloat16", "float16"
X6, X15, X50 = ((Target("speedup", bound),) for bound in (6, 15, 50))
NEAR_COPY = (Target("copy_share", 0.7),)

CASES = (
    MergeCase("merge", "deit_small", DEIT_S, 16, "cpu", variant="mean", quick=True),
    MergeCase("merge", "deit_small", DEIT_S, 16, "cpu", variant="amax"),
    MergeCase("merge_wavg", "deit_small", DEIT_S, 16, "cpu", quick=True, quick_compile=True, targets=X15),
    MergeCase("merge_wavg", "vit_base", VIT_B, 16, "cpu", quick=True, targets=X15),
    MergeCase("merge_wavg", "vit_large_384", VIT_L_384, 23, "cpu", quick=True, targets=(Target("times_clone", 2),)),
    MergeCase("merge_wavg", "deit_small", DEIT_S, 16, "cpu", BF16),
    MergeCase("merge_wavg", "deit_small", DEIT_S, 16, "cpu", training=True, quick=True),
    MergeCase("unmerge", "deit_small", DEIT_S, 16, "cpu", quick=True, targets=X6),
    MergeCase("unmerge", "vit_base", VIT_B, 16, "cpu", quick=True, targets=X6),
    MergeCase("unmerge", "sd_unet_64", UNET_64, 2048, "cpu"),
    MergeCase("unmerge", "deit_small", DEIT_S, 16, "cpu", training=True),
    MergeCase("then", "deit_small", DEIT_S, 16, "cpu", quick=True, targets=X50),
    MergeCase("then", "vit_large_384", VIT_L_384, 23, "cpu", quick=True, targets=X50),
    MergeCase("to_csr", "deit_small", DEIT_S, 16, "cpu", quick=True),
    MergeCase("merge", "deit_small", DEIT_S_64, 16, "cuda", BF16, variant="mean"),
    MergeCase("merge", "deit_small", DEIT_S_64, 16, "cuda", BF16, variant="amax"),
    MergeCase("merge_wavg", "deit_small", DEIT_S_64, 16, "cuda", BF16, quick=True),
    MergeCase("merge_wavg", "vit_large_384", VIT_L_384_256, 23, "cuda", BF16, quick=True, targets=NEAR_COPY),
    MergeCase("merge_wavg", "deit_small", DEIT_S_64, 16, "cuda", BF16, training=True),
    MergeCase("unmerge", "vit_large_384", VIT_L_384_256, 23, "cuda", BF16, quick=True, targets=NEAR_COPY),
    MergeCase("unmerge", "sd_unet_64", UNET_64, 2048, "cuda", FP16),
    MergeCase("unmerge", "deit_small", DEIT_S_64, 16, "cuda", BF16, training=True),
    MergeCase("then", "deit_small", DEIT_S_64, 16, "cuda", quick=True),
    MergeCase("to_csr", "deit_small", DEIT_S_64, 16, "cuda", quick=True),
)
