# SPDX-License-Identifier: MIT
"""The one table of what is measured: shapes named after the models they come from, and the targets they must reach."""

from __future__ import annotations

from dataclasses import dataclass

# What a target bounds, and how to say so. Ratios are medians of the ratios of each round; see timing.py.
MEASURES = {
    "speedup_published": ("least", "{:g}x the published chain"),
    "speedup_compiled": ("least", "{:g}x the compiled chain"),
    "copy_share": ("least", "{:.0%} of the copy bandwidth"),
    "flops_efficiency": ("least", "{:g} of the FLOPs ratio"),
    "times_clone": ("most", "{:g}x the time of x.clone()"),
    "median_us": ("most", "{:g} us"),
}


@dataclass(frozen=True)
class Target:
    """A bound that one measure of a row must keep."""

    measure: str
    bound: float

    def met(self, value: float) -> bool:
        """Whether a measured value keeps the bound."""
        return value >= self.bound if MEASURES[self.measure][0] == "least" else value <= self.bound

    def __str__(self) -> str:
        direction, text = MEASURES[self.measure]
        return f"at {direction} " + text.format(self.bound)


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Attributes:
        op: the op's name; "then" is TokenMap.then, "invert" the making of a map's second view.
        model: what the shape comes from.
        shape: (B, N, C).
        r: tokens to merge; the k of kth_bipartite_match.
        metric_dim: D of the metric (B, N, D), or the d of keys (B, H, N, d).
        heads: H of the keys; 0 for a metric (B, N, D).
        reduce: how `merge` reduces.
        training: forward and backward, for the gradient of the tokens; else forward, without gradients.
        host: times what a call costs the host (tiny tensors), not what it costs the device.
        quick: part of --quick.
        quick_compile: --quick also times the compiled chain, whose compilation costs seconds.
    """

    op: str
    model: str
    shape: tuple[int, int, int]
    r: int
    device: str
    dtype: str = "float32"
    metric_dim: int = 64
    heads: int = 0
    reduce: str = "mean"
    training: bool = False
    host: bool = False
    quick: bool = False
    quick_compile: bool = False
    targets: tuple[Target, ...] = ()

    @property
    def name(self) -> str:
        """What the results know this case by."""
        variant = self.reduce if self.op == "merge" else ""
        variant += "overhead" if self.host else "training" if self.training else ""
        variant += f"keys{self.heads}" if self.heads else ""
        batch = f"b{self.shape[0]}"
        return "/".join(filter(None, (self.op, variant, self.model, batch, f"r{self.r}", self.dtype, self.device)))

    @property
    def label(self) -> str:
        """The shapes, for tables."""
        batch, tokens, channels = self.shape
        if self.op.endswith("_match"):
            heads = f"{self.heads}, " if self.heads else ""
            shape = f"({batch}, {heads}{tokens}, {self.metric_dim})"
        elif self.op in ("then", "invert"):
            shape = f"({batch}, {tokens})"
        else:
            shape = f"({batch}, {tokens}, {channels})"
        if self.op == "bipartite_merge":
            shape += f", D {self.metric_dim}"
        return f"{shape}, {'k' if self.op.startswith('kth') else 'r'} {self.r}"


@dataclass(frozen=True)
class ModelCase:
    """A timm model, unpatched and patched with ToMe."""

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


AT_LEAST_15 = (Target("speedup_published", 15),)
AT_LEAST_50 = (Target("speedup_published", 50),)
AT_LEAST_6 = (Target("speedup_published", 6),)
OVERHEAD = (Target("median_us", 60),)

DEIT_S = (8, 197, 384)
VIT_B = (8, 197, 768)
VIT_L_384 = (4, 577, 1024)
UNET_64 = (2, 4096, 320)  # Stable Diffusion 1.5's first blocks at 512 x 512, with guidance
TINY = (1, 8, 8)

CPU_CASES = (
    Case("bipartite_match", "deit_small", DEIT_S, 16, "cpu", quick=True, targets=(Target("speedup_published", 1.5),)),
    Case("bipartite_match", "vit_large_384", VIT_L_384, 23, "cpu"),
    Case("bipartite_match", "sd_unet_64", UNET_64, 2048, "cpu", metric_dim=320),
    Case("bipartite_match", "deit_small", DEIT_S, 16, "cpu", heads=6),
    Case("kth_bipartite_match", "deit_small", DEIT_S, 4, "cpu", quick=True),
    Case("random_bipartite_match", "deit_small", DEIT_S, 16, "cpu", quick=True),
    Case("merge", "deit_small", DEIT_S, 16, "cpu", quick=True),
    Case("merge", "deit_small", DEIT_S, 16, "cpu", reduce="amax"),
    Case("merge_wavg", "deit_small", DEIT_S, 16, "cpu", quick=True, quick_compile=True, targets=AT_LEAST_15),
    Case("merge_wavg", "vit_base", VIT_B, 16, "cpu", quick=True, targets=AT_LEAST_15),
    Case("merge_wavg", "vit_large_384", VIT_L_384, 23, "cpu", quick=True, targets=(Target("times_clone", 2),)),
    Case("merge_wavg", "deit_small", DEIT_S, 16, "cpu", dtype="bfloat16"),
    Case("merge_wavg", "deit_small", DEIT_S, 16, "cpu", training=True, quick=True),
    Case("unmerge", "deit_small", DEIT_S, 16, "cpu", quick=True, targets=AT_LEAST_6),
    Case("unmerge", "vit_base", VIT_B, 16, "cpu", quick=True, targets=AT_LEAST_6),
    Case("unmerge", "sd_unet_64", UNET_64, 2048, "cpu"),
    Case("unmerge", "deit_small", DEIT_S, 16, "cpu", training=True),
    Case("bipartite_merge", "deit_small", DEIT_S, 16, "cpu", quick=True, quick_compile=True),
    Case("bipartite_merge", "vit_base", VIT_B, 16, "cpu"),
    Case("bipartite_merge", "tiny", TINY, 2, "cpu", metric_dim=8, host=True, quick=True, targets=OVERHEAD),
    Case("then", "deit_small", DEIT_S, 16, "cpu", quick=True, targets=AT_LEAST_50),
    Case("then", "vit_large_384", VIT_L_384, 23, "cpu", quick=True, targets=AT_LEAST_50),
    Case("invert", "deit_small", DEIT_S, 16, "cpu", quick=True),
)

BF16 = "bfloat16"
DEIT_S_64 = (64, 197, 384)
VIT_L_384_256 = (256, 577, 1024)
GPU_MERGE = (Target("speedup_published", 10), Target("speedup_compiled", 3), Target("median_us", 25))
MOSTLY_COPY = (Target("copy_share", 0.7),)

CUDA_CASES = (
    Case("bipartite_match", "deit_small", DEIT_S_64, 16, "cuda", BF16, quick=True),
    Case("bipartite_match", "deit_small", DEIT_S_64, 16, "cuda"),
    Case("bipartite_match", "deit_small", DEIT_S_64, 16, "cuda", BF16, heads=6),
    Case("bipartite_match", "vit_large_384", (64, 577, 1024), 23, "cuda", BF16),
    Case("bipartite_match", "sd_unet_64", UNET_64, 2048, "cuda", "float16", metric_dim=320),
    Case("kth_bipartite_match", "deit_small", DEIT_S_64, 4, "cuda", BF16),
    Case("random_bipartite_match", "deit_small", DEIT_S_64, 16, "cuda", BF16),
    Case("merge", "deit_small", DEIT_S_64, 16, "cuda", BF16),
    Case("merge", "deit_small", DEIT_S_64, 16, "cuda", BF16, reduce="amax"),
    Case("merge_wavg", "deit_small", DEIT_S_64, 16, "cuda", BF16, quick=True),
    Case("merge_wavg", "vit_large_384", VIT_L_384_256, 23, "cuda", BF16, quick=True, targets=MOSTLY_COPY),
    Case("merge_wavg", "deit_small", DEIT_S_64, 16, "cuda", BF16, training=True),
    Case("unmerge", "vit_large_384", VIT_L_384_256, 23, "cuda", BF16, quick=True, targets=MOSTLY_COPY),
    Case("unmerge", "sd_unet_64", UNET_64, 2048, "cuda", "float16"),
    Case("unmerge", "deit_small", DEIT_S_64, 16, "cuda", BF16, training=True),
    Case(
        "bipartite_merge", "deit_small", DEIT_S_64, 16, "cuda", BF16, quick=True, quick_compile=True, targets=GPU_MERGE
    ),
    Case("bipartite_merge", "vit_large_384", (64, 577, 1024), 23, "cuda", BF16),
    Case("bipartite_merge", "tiny", TINY, 2, "cuda", metric_dim=8, host=True, quick=True, targets=OVERHEAD),
    Case("then", "deit_small", DEIT_S_64, 16, "cuda", quick=True),
    Case("invert", "deit_small", DEIT_S_64, 16, "cuda", quick=True),
)

CASES = CPU_CASES + CUDA_CASES
OPS = tuple(dict.fromkeys(case.op for case in CASES))

MODEL_CASES = (
    ModelCase("deit_small_patch16_224", 4, 16, "cpu", quick=True),
    ModelCase("deit_small_patch16_224", 8, 8, "cpu"),
    ModelCase("vit_base_patch16_224", 8, 16, "cpu"),
    ModelCase("deit_small_patch16_224", 64, 16, "cuda", BF16, quick=True),
    ModelCase("vit_base_patch16_224", 64, 16, "cuda", BF16),
    ModelCase("vit_large_patch16_224", 64, 8, "cuda", BF16, quick=True, targets=(Target("flops_efficiency", 0.9),)),
)
