# SPDX-License-Identifier: MIT
"""The one table of what is measured: shapes named after the models they come from, and the targets they must reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

# What a target bounds, and how to say so. Ratios are medians of the ratios of each round; see timing.py.
MEASURES = {
    "speedup_published": ("least", "{:g}x the published chain"),
    "speedup_compiled": ("least", "{:g}x the compiled chain"),
    "speedup_reference": ("least", "{:g}x the eager reference"),
    "copy_share": ("least", "{:.0%} of the copy bandwidth"),
    "matmul_share": ("least", "{:.0%} of a matrix product's rate"),
    "flops_efficiency": ("least", "{:g} of the FLOPs ratio"),
    "times_clone": ("most", "{:g}x the time of x.clone()"),
    "times_fused": ("most", "{:g}x the time of torch's fused attention without either"),
    "median_us": ("most", "{:g} us"),
    "peak_share_published": ("most", "{:.0%} of the published chain's peak memory"),
    "working_share_published": ("most", "{:.0%} of the published chain's memory beyond the results"),
    "peak_per_token": ("most", "{:g} bytes of memory a token"),
}
WINDOW_OPS = ("window_match", "window_merge")
# What attention.py has. keep_topk is timed with the merge that follows, the tokens that are not kept being fused.
ATTENTION_OPS = ("token_attention", "keep_topk")
LOOKUP_OPS = ("lookup_gather", "lookup_scatter")  # what lookup.py has
# These decide how many tokens merge by the tokens themselves; inputs are drawn so that it is `r`.
ADAPTIVE_OPS = (*WINDOW_OPS, "adaptive_bipartite_match")


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
        op: the op's name; "then" is TokenMap.then, "to_csr" the making of a map's second view, "window_merge" a
            window_match followed by merge_wavg.
        model: what the shape comes from.
        shape: (B, N, C).
        r: tokens to merge, or windows, or those that are not kept; the k of kth_bipartite_match; the number of
            compressed tokens.
        metric_dim: D of the metric (B, N, D), or the d of keys (B, H, N, d).
        heads: H of the keys; 0 for a metric (B, N, D).
        reduce: how `merge` reduces.
        variant: what a token_attention has, of "size", "policy" and "class" (importance), with "+" between.
        window: height and width of a window, or of a cell of grid_bipartite_match.
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
    variant: str = ""
    window: tuple[int, int] = (2, 2)
    training: bool = False
    host: bool = False
    quick: bool = False
    quick_compile: bool = False
    targets: tuple[Target, ...] = ()

    @property
    def name(self) -> str:
        """What the results know this case by."""
        variant = self.reduce if self.op == "merge" else self.variant
        variant += "-" if self.variant and self.training else ""
        variant += "overhead" if self.host else "training" if self.training else ""
        variant += f"keys{self.heads}" if self.heads and self.op.endswith("_match") else ""
        variant += "{}x{}".format(*self.window) if self.window != (2, 2) else ""
        batch = f"b{self.shape[0]}"
        return "/".join(filter(None, (self.op, variant, self.model, batch, f"r{self.r}", self.dtype, self.device)))

    @property
    def prefix(self) -> int:
        """Leading tokens that are protected: the class token, which a diffusion model has not."""
        return int(self.op != "grid_bipartite_match")

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the tokens behind the prefix: as square as their number allows."""
        tokens = self.shape[1] - self.prefix
        height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
        return height, tokens // height

    @property
    def label(self) -> str:
        """The shapes, for tables."""
        batch, tokens, channels = self.shape
        if self.op in WINDOW_OPS:
            height, width = self.window
            windows = (self.grid[0] // height) * (self.grid[1] // width)
            return f"({batch}, {tokens}, {channels}), {self.r} of {windows} windows {height}x{width}"
        if self.op == "token_attention":
            passes = ", forward and backward" if self.training else ""
            return f"({batch}, {self.heads}, {tokens}, {self.metric_dim}), {self.variant}{passes}"
        if self.op in LOOKUP_OPS:
            both = "gather and scatter" if self.op == "lookup_scatter" else "gather"
            passes = ", forward and backward" if self.training else ""
            return f"({batch}, {self.heads}, {self.r} of {tokens}, {self.metric_dim}), {both}{passes}"
        if self.op == "keep_topk":
            return f"({batch}, {tokens}, {channels}), {self.r} fused"
        if self.op.endswith("_match"):
            heads = f"{self.heads}, " if self.heads else ""
            shape = f"({batch}, {heads}{tokens}, {self.metric_dim})"
        elif self.op in ("then", "to_csr"):
            shape = f"({batch}, {tokens})"
        else:
            shape = f"({batch}, {tokens}, {channels})"
        if self.op == "bipartite_merge":
            shape += f", D {self.metric_dim}"
        return f"{shape}, {'k' if self.op.startswith('kth') else 'r'} {self.r}"


AT_LEAST_15 = (Target("speedup_published", 15),)
AT_LEAST_50 = (Target("speedup_published", 50),)
AT_LEAST_60 = (Target("speedup_published", 60),)
AT_LEAST_6 = (Target("speedup_published", 6),)
AS_TORCHS = (Target("times_fused", 1),)
OVERHEAD = (Target("median_us", 60),)

DEIT_S = (8, 197, 384)
VIT_B = (8, 197, 768)
VIT_L_384 = (4, 577, 1024)
UNET_64 = (2, 4096, 320)  # Stable Diffusion 1.5's first blocks at 512 x 512, with guidance
SEGMENTER_S = (8, 1025, 384)  # ViT-S/16 at 512 x 512
SEGMENTER_S_LATER = (8, 593, 384)  # after 144 windows of it have merged: what ALGM's later layers match
TINY = (1, 8, 8)

LOOKUP = (2, 4096, 768)  # LookupViT-B at 1024 x 1024
WORKING_TENTH = Target("working_share_published", 0.1)
SCATTER = (Target("speedup_published", 1.3), WORKING_TENTH)
TRAINED = (Target("speedup_published", 2), WORKING_TENTH)
GRID = (Target("speedup_published", 1.3), Target("peak_share_published", 0.25))
POLICY = (Target("speedup_published", 2), Target("peak_share_published", 1 / 3))
BF16 = "bfloat16"
NO_SLOWER = (Target("speedup_published", 1),)
ADAPTIVE = "adaptive_bipartite_match"

CPU_CASES = (
    Case("bipartite_match", "deit_small", DEIT_S, 16, "cpu", quick=True, targets=(Target("speedup_published", 1.5),)),
    Case("bipartite_match", "vit_large_384", VIT_L_384, 23, "cpu"),
    Case("bipartite_match", "sd_unet_64", UNET_64, 2048, "cpu", metric_dim=320),
    Case("bipartite_match", "deit_small", DEIT_S, 16, "cpu", heads=6),
    Case("bipartite_match", "vit_large_384", VIT_L_384, 23, "cpu", BF16),
    Case("kth_bipartite_match", "deit_small", DEIT_S, 4, "cpu", quick=True),
    Case("random_bipartite_match", "deit_small", DEIT_S, 16, "cpu", quick=True),
    Case("merge", "deit_small", DEIT_S, 16, "cpu", quick=True),
    Case("merge", "deit_small", DEIT_S, 16, "cpu", reduce="amax"),
    Case("merge_wavg", "deit_small", DEIT_S, 16, "cpu", quick=True, quick_compile=True, targets=AT_LEAST_15),
    Case("merge_wavg", "vit_base", VIT_B, 16, "cpu", quick=True, targets=AT_LEAST_15),
    Case("merge_wavg", "vit_large_384", VIT_L_384, 23, "cpu", quick=True, targets=(Target("times_clone", 2),)),
    Case("merge_wavg", "deit_small", DEIT_S, 16, "cpu", BF16),
    Case("merge_wavg", "deit_small", DEIT_S, 16, "cpu", training=True, quick=True),
    Case("unmerge", "deit_small", DEIT_S, 16, "cpu", quick=True, targets=AT_LEAST_6),
    Case("unmerge", "vit_base", VIT_B, 16, "cpu", quick=True, targets=AT_LEAST_6),
    Case("unmerge", "sd_unet_64", UNET_64, 2048, "cpu"),
    Case("unmerge", "deit_small", DEIT_S, 16, "cpu", training=True),
    Case("bipartite_merge", "deit_small", DEIT_S, 16, "cpu", quick=True, quick_compile=True),
    Case("bipartite_merge", "vit_base", VIT_B, 16, "cpu"),
    Case("bipartite_merge", "tiny", TINY, 2, "cpu", metric_dim=8, host=True, quick=True, targets=OVERHEAD),
    Case("window_match", "segmenter_small_512", SEGMENTER_S, 144, "cpu", quick=True),
    Case("window_merge", "segmenter_small_512", SEGMENTER_S, 144, "cpu", quick=True, targets=AT_LEAST_60),
    Case("window_merge", "segmenter_small_512", SEGMENTER_S, 36, "cpu", window=(4, 4)),
    Case("window_merge", "segmenter_small_512", SEGMENTER_S, 144, "cpu", BF16),
    Case(ADAPTIVE, "deit_tiny", (1, 197, 192), 36, "cpu", metric_dim=192, quick=True, targets=NO_SLOWER),
    Case(ADAPTIVE, "vit_small_patch32", (1, 50, 384), 8, "cpu", metric_dim=384, quick=True, targets=NO_SLOWER),
    Case(ADAPTIVE, "deit_small", DEIT_S, 34, "cpu", metric_dim=384, quick=True, targets=NO_SLOWER),
    Case(ADAPTIVE, "segmenter_small_512", SEGMENTER_S_LATER, 112, "cpu", metric_dim=384, quick=True, targets=NO_SLOWER),
    Case(ADAPTIVE, "vit_small_384x512", (8, 769, 384), 140, "cpu", metric_dim=384, quick=True, targets=NO_SLOWER),
    Case(ADAPTIVE, "vit_base_512", (2, 1025, 768), 194, "cpu", metric_dim=768, quick=True, targets=NO_SLOWER),
    Case("grid_bipartite_match", "sd_unet_64", (1, 4096, 320), 2048, "cpu", metric_dim=320, quick=True, targets=GRID),
    Case("grid_bipartite_match", "sd_unet_64", UNET_64, 2048, "cpu", metric_dim=320),
    Case(
        "grid_bipartite_match", "sd_unet_64", UNET_64, 2048, "cpu", BF16, metric_dim=320, quick=True, targets=NO_SLOWER
    ),
    Case("importance_match", "deit_small", DEIT_S, 67, "cpu", quick=True),
    Case("importance_match", "deit_small", DEIT_S, 67, "cpu", heads=6),
    Case("keep_topk", "deit_small", DEIT_S, 58, "cpu", quick=True, targets=(Target("speedup_published", 3),)),
    Case("keep_topk", "vit_base", VIT_B, 58, "cpu", BF16),
    Case("token_attention", "deit_small", DEIT_S, 0, "cpu", heads=6, variant="policy"),
    Case(
        "token_attention",
        "deit_small",
        DEIT_S,
        0,
        "cpu",
        heads=6,
        variant="policy",
        training=True,
        quick=True,
        targets=POLICY,
    ),
    Case("token_attention", "deit_small", DEIT_S, 0, "cpu", heads=6, variant="size", quick=True, targets=AS_TORCHS),
    # The shortest that are not torch's; see `backends.LONG`.
    Case("token_attention", "long", (8, 160, 384), 0, "cpu", heads=6, variant="size"),
    Case("token_attention", "ragged", (8, 97, 384), 0, "cpu", heads=6, variant="size"),
    Case("token_attention", "ragged_narrow", (8, 129, 384), 0, "cpu", metric_dim=32, heads=12, variant="size"),
    Case("token_attention", "deit_small", DEIT_S, 0, "cpu", heads=6, variant="class", quick=True),
    Case("token_attention", "vit_base_384", (2, 577, 768), 0, "cpu", heads=12, variant="size+class"),
    Case("token_attention", "deit_small", DEIT_S, 0, "cpu", BF16, heads=6, variant="policy", training=True),
    Case(
        "token_attention",
        "deit_small",
        DEIT_S,
        0,
        "cpu",
        BF16,
        heads=6,
        variant="size+class",
        quick=True,
        targets=AS_TORCHS,
    ),
    Case("lookup_gather", "lookupvit_base", LOOKUP, 100, "cpu", heads=12),
    Case("lookup_scatter", "lookupvit_base", LOOKUP, 100, "cpu", heads=12, quick=True, targets=SCATTER),
    Case("lookup_scatter", "lookupvit_base", LOOKUP, 100, "cpu", heads=12, training=True, quick=True, targets=TRAINED),
    Case("lookup_scatter", "lookupvit_base", LOOKUP, 100, "cpu", BF16, heads=12, quick=True, targets=NO_SLOWER),
    Case(
        "lookup_scatter",
        "lookupvit_base",
        LOOKUP,
        100,
        "cpu",
        BF16,
        heads=12,
        training=True,
        quick=True,
        targets=NO_SLOWER,
    ),
    Case("then", "deit_small", DEIT_S, 16, "cpu", quick=True, targets=AT_LEAST_50),
    Case("then", "vit_large_384", VIT_L_384, 23, "cpu", quick=True, targets=AT_LEAST_50),
    Case("to_csr", "deit_small", DEIT_S, 16, "cpu", quick=True),
)

DEIT_S_64 = (64, 197, 384)
VIT_L_384_256 = (256, 577, 1024)
GPU_MERGE = (Target("speedup_published", 10), Target("speedup_compiled", 3), Target("median_us", 25))
MOSTLY_COPY = (Target("copy_share", 0.7),)
VIT_B_1024 = (64, 1 + 64 * 64, 768)  # ViT-B/16 at 1024 x 1024
LOOKUP_16 = (16, 4096, 768)
VIT_B_384_64 = (64, 577, 768)
UNET_128 = (2, 128 * 128, 320)  # Stable Diffusion's first blocks at 1024 x 1024, with guidance
WINDOWS_AS_COPY = (Target("copy_share", 0.6), Target("speedup_reference", 20))
# Of what a match writes (dest, members, begin, count) and ranks by; a row of scores would take 6144 times the dtype.
GRID_AS_PRODUCT = (Target("matmul_share", 0.5), Target("peak_per_token", 128))

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
    Case("window_match", "vit_base_1024", VIT_B_1024, 576, "cuda", BF16, quick=True),
    Case("window_merge", "vit_base_1024", VIT_B_1024, 576, "cuda", BF16, quick=True, targets=WINDOWS_AS_COPY),
    Case("window_merge", "segmenter_small_512", SEGMENTER_S, 144, "cuda", BF16),
    Case(ADAPTIVE, "deit_small", DEIT_S_64, 28, "cuda", BF16, metric_dim=384, quick=True),
    Case(ADAPTIVE, "vit_base_512", (16, 1025, 768), 186, "cuda", BF16, metric_dim=768),
    Case(
        "grid_bipartite_match",
        "sd_unet_128",
        UNET_128,
        8192,
        "cuda",
        BF16,
        metric_dim=320,
        quick=True,
        targets=GRID_AS_PRODUCT,
    ),
    Case("grid_bipartite_match", "sd_unet_64", UNET_64, 2048, "cuda", "float16", metric_dim=320),
    Case("importance_match", "deit_small", DEIT_S_64, 67, "cuda", BF16, quick=True),
    Case("keep_topk", "deit_small", DEIT_S_64, 58, "cuda", BF16, quick=True),
    Case(
        "token_attention",
        "vit_base_384",
        VIT_B_384_64,
        0,
        "cuda",
        BF16,
        heads=12,
        variant="size+class",
        quick=True,
        targets=(Target("times_fused", 1.25), Target("speedup_published", 3)),
    ),
    Case(
        "token_attention",
        "vit_base_384",
        VIT_B_384_64,
        0,
        "cuda",
        BF16,
        heads=12,
        variant="size+class",
        training=True,
        quick=True,
        targets=(Target("times_fused", 1.4),),
    ),
    Case("token_attention", "vit_base_384", VIT_B_384_64, 0, "cuda", BF16, heads=12, variant="policy", training=True),
    Case(
        "lookup_scatter",
        "lookupvit_base",
        LOOKUP_16,
        100,
        "cuda",
        BF16,
        heads=12,
        quick=True,
        quick_compile=True,
        targets=(Target("speedup_published", 2), Target("speedup_compiled", 1.3)),
    ),
    Case(
        "lookup_scatter",
        "lookupvit_base",
        LOOKUP_16,
        100,
        "cuda",
        BF16,
        heads=12,
        training=True,
        quick=True,
        targets=(Target("speedup_published", 1.8),),
    ),
    Case("lookup_gather", "lookupvit_base", LOOKUP_16, 100, "cuda", BF16, heads=12),
    Case("then", "deit_small", DEIT_S_64, 16, "cuda", quick=True),
    Case("to_csr", "deit_small", DEIT_S_64, 16, "cuda", quick=True),
)

CASES = CPU_CASES + CUDA_CASES
OPS = tuple(dict.fromkeys(case.op for case in CASES))
