# SPDX-License-Identifier: MIT
"""What the model suite measures."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import BF16, Target


@dataclass(frozen=True)
class ModelCase:
    """A model, by its name in `model_zoo.py`, unpatched and patched with ToMe."""

    model: str
    batch: int
    r: int
    device: str
    dtype: str = "float32"
    quick: bool = False
    targets: tuple[Target, ...] = ()

    @property
    def name(self) -> str:
        """What the results know this case by."""
        return f"model/{self.model}/b{self.batch}/r{self.r}/{self.dtype}/{self.device}"


MODEL_CASES = (
    ModelCase("deit_small_patch16_224", 4, 16, "cpu", quick=True),
    ModelCase("deit_small_patch16_224", 8, 8, "cpu"),
    ModelCase("vit_base_patch16_224", 8, 16, "cpu"),
    ModelCase("vit_small_patch16_dinov3", 8, 16, "cpu"),
    ModelCase("transformers/dinov2-small", 8, 16, "cpu"),
    ModelCase("transformers/siglip-base-patch16-224", 8, 16, "cpu"),
    ModelCase("deit_small_patch16_224", 8, 8, "cpu", BF16),
    ModelCase("vit_base_patch16_224", 8, 16, "cpu", BF16),
    ModelCase("deit_small_patch16_224", 64, 16, "cuda", BF16, quick=True),
    ModelCase("vit_base_patch16_224", 64, 16, "cuda", BF16),
    ModelCase("vit_base_patch16_dinov3", 64, 16, "cuda", BF16),
    ModelCase("vit_large_patch16_224", 64, 8, "cuda", BF16, quick=True, targets=(Target("flops_efficiency", 0.9),)),
)
