# SPDX-License-Identifier: MIT
"""Selectors that match tokens to destinations, and ToMe's bipartite merge in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import tokred_kernels as tk
from benchmarks.baselines import algm, pruning, tome, tomesd
from benchmarks.harness.case import FLOAT32, Case, Target, map_bytes
from benchmarks.harness.inputs import halfway, normal, picture, sizes

ADAPTIVE, GRID = "adaptive_bipartite_match", "grid_bipartite_match"


@dataclass(frozen=True)
class MatchCase(Case):
    """A match on a metric (B, N, D) or on keys (B, H, N, d)."""

    @property
    def label(self) -> str:
        batch, tokens, channels = self.shape
        r = f"{'k' if self.op.startswith('kth') else 'r'} {self.r}"
        if self.op == "bipartite_merge":
            return f"({batch}, {tokens}, {channels}), D {self.metric_dim}, {r}"
        heads = f"{self.heads}, " if self.heads else ""
        return f"({batch}, {heads}{tokens}, {self.metric_dim}), {r}"

    def draw(self, seed: int) -> SimpleNamespace:
        """Return random inputs; `layer_index` is such that `r` tokens merge."""
        batch, tokens, channels = self.shape
        draw = normal(self, seed)
        if self.op in (ADAPTIVE, GRID):
            inputs = SimpleNamespace(metric=picture(self, self.metric_dim, seed))
        else:
            keys = (self.heads, tokens, self.metric_dim) if self.heads else (tokens, self.metric_dim)
            inputs = SimpleNamespace(metric=draw(batch, *keys).to(self.torch_dtype))
        if self.op == "bipartite_merge":
            inputs.x, inputs.size = draw(batch, tokens, channels).to(self.torch_dtype), sizes(self, seed)
            inputs.size_as_x = inputs.size.to(self.torch_dtype)
        if self.op == ADAPTIVE:
            unit = F.normalize(inputs.metric.double(), dim=-1)
            best = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).amax(-1)[:, 1:]
            above = halfway(best, self.r) - float(best.mean(1).mean())
            if above <= 0:
                raise ValueError(f"{self.name}: r must be smaller, so that the threshold is above the mean similarity")
            inputs.layer_index = float(best.std(1).mean()) / above
        return inputs

    def baseline(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        """Return the chain of ToMe, ALGM, ToMe for diffusion or DiffRate."""
        r, kept = self.r, self.shape[1] - self.r

        def bipartite_merge(metric: Tensor, x: Tensor, size: Tensor) -> tuple[tome.Plan, Tensor, Tensor]:
            plan = tome.bipartite_plan(metric, r, class_token=True)
            return plan, *tome.merge_wavg(plan.merge, x, size)

        def importance_match(metric: Tensor) -> tuple[tome.Plan, Tensor]:
            return pruning.importance_plan(metric.mean(1) if metric.dim() == 4 else metric, kept)

        return {
            "bipartite_match": (lambda m: tome.bipartite_plan(m, r, class_token=True), ("metric",)),
            "kth_bipartite_match": (lambda m: tome.kth_plan(m, r), ("metric",)),
            "random_bipartite_match": (lambda m: tome.random_plan(m, r), ("metric",)),
            "bipartite_merge": (bipartite_merge, ("metric", "x", "size_as_x")),
            ADAPTIVE: (lambda m, layer: algm.adaptive_plan(m, layer, class_token=True), ("metric", "layer_index")),
            GRID: (lambda m: tomesd.grid_plan(m, r, self.grid, self.window), ("metric",)),
            "importance_match": (importance_match, ("metric",)),
        }[self.op]

    def ours(self, inputs: SimpleNamespace) -> Any:
        metric, r = inputs.metric, self.r
        return {
            "bipartite_match": lambda: tk.bipartite_match(metric, r, class_token=True),
            "kth_bipartite_match": lambda: tk.kth_bipartite_match(metric, r),
            "random_bipartite_match": lambda: tk.random_bipartite_match(metric, r),
            "bipartite_merge": lambda: tk.bipartite_merge(
                inputs.x, r, metric=metric, size=inputs.size, class_token=True
            ),
            ADAPTIVE: lambda: tk.adaptive_bipartite_match(metric, layer_index=inputs.layer_index, class_token=True),
            GRID: lambda: tk.grid_bipartite_match(metric, r, grid=self.grid, stride=self.window),
            "importance_match": lambda: tk.importance_match(metric, self.shape[1] - r, class_token=True),
        }[self.op]()

    def slots(self) -> int:
        tokens = self.shape[1]
        if self.op in ("random_bipartite_match", "importance_match"):
            return tokens - self.r
        if self.op == "kth_bipartite_match":
            return tokens // self.r
        if self.op == GRID:
            return tokens - min(self.r, tokens - self._cells())
        return super().slots()

    def least_bytes(self) -> int:
        """Return the bytes of the metric and the map, and those of the tokens if they merge."""
        batch, tokens, channels = self.shape
        total = batch * max(self.heads, 1) * tokens * self.metric_dim * self.item
        total += map_bytes(batch, tokens, self.slots())
        if self.op == "importance_match":  # and the similarities
            total += FLOAT32 * batch * self.r
        if self.op == "bipartite_merge":
            total += batch * (tokens + self.slots()) * (channels * self.item + FLOAT32)
        return total

    def operations(self) -> int:
        """Return the operations of the product of sources and destinations."""
        batch, tokens, _ = self.shape
        if self.op in ("kth_bipartite_match", "random_bipartite_match", "importance_match"):
            destinations = self.slots()
        else:
            destinations = self._cells() if self.op == GRID else tokens // 2
        sources = destinations * (self.r - 1) if self.op == "kth_bipartite_match" else tokens - destinations
        return 2 * batch * sources * destinations * self.metric_dim

    def _cells(self) -> int:
        return (self.grid[0] // self.window[0]) * (self.grid[1] // self.window[1])


DEIT_S, VIT_L_384 = (8, 197, 384), (4, 577, 1024)
DEIT_S_64, VIT_L_384_64 = (64, 197, 384), (64, 577, 1024)
UNET_64 = (2, 4096, 320)  # Stable Diffusion 1.5's first blocks at 512 x 512, with guidance
UNET_128 = (2, 128 * 128, 320)  # at 1024 x 1024
SEGMENTER_LATER = (8, 593, 384)  # ViT-S/16 at 512 x 512 after 144 windows have merged
TINY = (1, 8, 8)
BF16, FP16 = "bfloat16", "float16"

NO_SLOWER = (Target("speedup", 1),)
OVERHEAD = (Target("median_us", 60),)
GRID_TARGETS = (Target("speedup", 1.3), Target("peak_share", 0.25))
# Memory for the map and the ranking only: a row of scores would take 6144 times the dtype.
GRID_GPU = (Target("matmul_share", 0.5), Target("peak_per_token", 128))
MERGE_GPU = (Target("speedup", 10), Target("speedup_compiled", 3), Target("median_us", 25))

CASES = (
    MatchCase("bipartite_match", "deit_small", DEIT_S, 16, "cpu", quick=True, targets=(Target("speedup", 1.5),)),
    MatchCase("bipartite_match", "vit_large_384", VIT_L_384, 23, "cpu"),
    MatchCase("bipartite_match", "sd_unet_64", UNET_64, 2048, "cpu", metric_dim=320),
    MatchCase("bipartite_match", "deit_small", DEIT_S, 16, "cpu", heads=6),
    MatchCase("bipartite_match", "vit_large_384", VIT_L_384, 23, "cpu", BF16),
    MatchCase("kth_bipartite_match", "deit_small", DEIT_S, 4, "cpu", quick=True),
    MatchCase("random_bipartite_match", "deit_small", DEIT_S, 16, "cpu", quick=True),
    MatchCase("bipartite_merge", "deit_small", DEIT_S, 16, "cpu", quick=True, quick_compile=True),
    MatchCase("bipartite_merge", "vit_base", (8, 197, 768), 16, "cpu"),
    MatchCase("bipartite_merge", "tiny", TINY, 2, "cpu", metric_dim=8, host=True, quick=True, targets=OVERHEAD),
    *(
        MatchCase(ADAPTIVE, model, shape, r, "cpu", metric_dim=shape[2], quick=True, targets=NO_SLOWER)
        for model, shape, r in (
            ("deit_tiny", (1, 197, 192), 36),
            ("vit_small_patch32", (1, 50, 384), 8),
            ("deit_small", DEIT_S, 34),
            ("segmenter_small_512", SEGMENTER_LATER, 112),
            ("vit_small_384x512", (8, 769, 384), 140),
            ("vit_base_512", (2, 1025, 768), 194),
        )
    ),
    MatchCase(GRID, "sd_unet_64", (1, 4096, 320), 2048, "cpu", metric_dim=320, quick=True, targets=GRID_TARGETS),
    MatchCase(GRID, "sd_unet_64", UNET_64, 2048, "cpu", metric_dim=320),
    MatchCase(GRID, "sd_unet_64", UNET_64, 2048, "cpu", BF16, metric_dim=320, quick=True, targets=NO_SLOWER),
    MatchCase("importance_match", "deit_small", DEIT_S, 67, "cpu", quick=True),
    MatchCase("importance_match", "deit_small", DEIT_S, 67, "cpu", heads=6),
    MatchCase("bipartite_match", "deit_small", DEIT_S_64, 16, "cuda", BF16, quick=True),
    MatchCase("bipartite_match", "deit_small", DEIT_S_64, 16, "cuda"),
    MatchCase("bipartite_match", "deit_small", DEIT_S_64, 16, "cuda", BF16, heads=6),
    MatchCase("bipartite_match", "vit_large_384", VIT_L_384_64, 23, "cuda", BF16),
    MatchCase("bipartite_match", "sd_unet_64", UNET_64, 2048, "cuda", FP16, metric_dim=320),
    MatchCase("kth_bipartite_match", "deit_small", DEIT_S_64, 4, "cuda", BF16),
    MatchCase("random_bipartite_match", "deit_small", DEIT_S_64, 16, "cuda", BF16),
    MatchCase("bipartite_merge", "deit_small", DEIT_S_64, 16, "cuda", BF16, quick=True, quick_compile=True,
              targets=MERGE_GPU),
    MatchCase("bipartite_merge", "vit_large_384", VIT_L_384_64, 23, "cuda", BF16),
    MatchCase("bipartite_merge", "tiny", TINY, 2, "cuda", metric_dim=8, host=True, quick=True, targets=OVERHEAD),
    MatchCase(ADAPTIVE, "deit_small", DEIT_S_64, 28, "cuda", BF16, metric_dim=384, quick=True),
    MatchCase(ADAPTIVE, "vit_base_512", (16, 1025, 768), 186, "cuda", BF16, metric_dim=768),
    MatchCase(GRID, "sd_unet_128", UNET_128, 8192, "cuda", BF16, metric_dim=320, quick=True, targets=GRID_GPU),
    MatchCase(GRID, "sd_unet_64", UNET_64, 2048, "cuda", FP16, metric_dim=320),
    MatchCase("importance_match", "deit_small", DEIT_S_64, 67, "cuda", BF16, quick=True),
)  # fmt: skip
