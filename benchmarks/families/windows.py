# SPDX-License-Identifier: MIT
"""ALGM's match of windows, alone and followed by the merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import tokred_kernels as tk
from benchmarks.baselines import algm, tome
from benchmarks.harness.case import FLOAT32, Case, Target, map_bytes
from benchmarks.harness.inputs import halfway, picture


@dataclass(frozen=True)
class WindowCase(Case):
    """`r` windows of similar tokens merge."""

    @property
    def label(self) -> str:
        batch, tokens, channels = self.shape
        (height, width), (down, across) = self.grid, self.window
        windows = (height // down) * (width // across)
        return f"({batch}, {tokens}, {channels}), {self.r} of {windows} windows {down}x{across}"

    def draw(self, seed: int) -> SimpleNamespace:
        """Return random inputs and the threshold that `r` windows reach."""
        x = picture(self, self.shape[2], seed)
        return SimpleNamespace(x=x, threshold=halfway(window_cosines(x[:, 1:], self.grid, self.window), self.r))

    def baseline(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        """Return ALGM's chain."""

        def match(x: Tensor, threshold: float) -> algm.WindowPlan:
            return algm.window_plan(x, threshold, self.window)

        def merge(x: Tensor, threshold: float) -> tuple[tome.Plan, Tensor, Tensor]:
            plan = match(x, threshold)
            return plan, *tome.merge_wavg(plan.merge, x)

        return (merge if self.op == "window_merge" else match), ("x", "threshold")

    def yardsticks(self) -> dict[str, Callable[[SimpleNamespace], Any]]:
        return {"clone": lambda i: i.x.clone()} if self.op == "window_merge" else {}

    def ours(self, inputs: SimpleNamespace) -> Any:
        token_map = tk.window_match(inputs.x, inputs.threshold, window=self.window, num_prefix=1)
        if self.op == "window_match":
            return token_map
        return tk.MergeOutput(*tk.merge_wavg(inputs.x, token_map), token_map)

    def slots(self) -> int:
        return self.shape[1] - self.r * (self.window[0] * self.window[1] - 1)

    def least_bytes(self) -> int:
        """Return the bytes of tokens and map. A merge reads the tokens twice: first to find the windows."""
        batch, tokens, channels = self.shape
        x = batch * tokens * channels * self.item
        total = x + map_bytes(batch, tokens, self.slots())
        if self.op == "window_merge":
            total += x + batch * self.slots() * (channels * self.item + FLOAT32)
        return total


def window_cosines(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Return the mean cosine (B, W) of the pairs of different tokens in each window of x (B, h w, C), in float64."""
    (height, width), size = window, window[0] * window[1]
    down, across = grid[0] // height, grid[1] // width
    unit = F.normalize(x.double(), dim=-1).unflatten(1, grid)[:, : down * height, : across * width]
    total = unit.unflatten(2, (across, width)).unflatten(1, (down, height)).sum((2, 4))
    return ((total.square().sum(-1) - size) / (size * (size - 1))).flatten(1)


SEGMENTER_S = (8, 1025, 384)  # ViT-S/16 at 512 x 512
VIT_B_1024 = (64, 1 + 64 * 64, 768)  # ViT-B/16 at 1024 x 1024
BF16 = "bfloat16"
CPU_TARGETS = (Target("speedup", 60),)
GPU_TARGETS = (Target("copy_share", 0.6), Target("speedup_reference", 20))

CASES = (
    WindowCase("window_match", "segmenter_small_512", SEGMENTER_S, 144, "cpu", quick=True),
    WindowCase("window_merge", "segmenter_small_512", SEGMENTER_S, 144, "cpu", quick=True, targets=CPU_TARGETS),
    WindowCase("window_merge", "segmenter_small_512", SEGMENTER_S, 36, "cpu", window=(4, 4)),
    WindowCase("window_merge", "segmenter_small_512", SEGMENTER_S, 144, "cpu", BF16),
    WindowCase("window_match", "vit_base_1024", VIT_B_1024, 576, "cuda", BF16, quick=True),
    WindowCase("window_merge", "vit_base_1024", VIT_B_1024, 576, "cuda", BF16, quick=True, targets=GPU_TARGETS),
    WindowCase("window_merge", "segmenter_small_512", SEGMENTER_S, 144, "cuda", BF16),
)
