# SPDX-License-Identifier: MIT
"""What the providers of a case are given: drawn at random, but with the structure that decides what they do with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred_kernels as tk
from benchmarks import attention, lookup, proofs, published, traffic
from benchmarks.cases import WINDOW_OPS, Case
from benchmarks.families import family
from tokred_kernels.partition import Partition, every_other
from tokred_kernels.windows import Windows

LARGEST_SIZE = 4  # tokens stand for 1 to 4 first tokens, as after some layers; exact in every dtype
# Pictures have a smooth part, of a deviation of 1 or less, that changes over so many tokens, and a texture of at most:
SMOOTH_OVER = 4
TEXTURE = 1.5
OF_PICTURES = (*WINDOW_OPS, "adaptive_bipartite_match", "grid_bipartite_match")


@dataclass
class Inputs:
    """All providers get the same tensors, on the same map; None is what a case does not take.

    Shapes: metric (B, N, D) or (B, H, N, d); x (B, N, C); size (B, N, 1) float32, and as the published code has it, in
    x's dtype; y (B, N', C); source (B, N', N); grad is what flows back, shaped as the op's output. `threshold` and
    `layer_index` are such that the case's `r` tokens, or windows, merge.
    """

    metric: Tensor | None = None
    x: Tensor | None = None
    size: Tensor | None = None
    size_as_x: Tensor | None = None
    plan: published.Plan | None = None
    token_map: tk.TokenMap | None = None
    y: Tensor | None = None
    grad: Tensor | None = None
    second_plan: published.BipartitePlan | None = None
    second_map: tk.TokenMap | None = None
    source: Tensor | None = None
    threshold: float | None = None
    layer_index: float | None = None


def draw(case: Case, seed: int) -> Inputs | attention.Inputs | lookup.Inputs:
    """Fresh random inputs; no zeros, which hide unwritten outputs and can run faster than real data."""
    own = family(case)
    if own is not None:
        return own.draw(case, seed)
    generator = torch.Generator(case.device).manual_seed(seed)
    if case.op in OF_PICTURES:
        return _draw_picture(case, generator)
    batch, tokens, channels = case.shape
    dtype, out = getattr(torch, case.dtype), traffic.slots(case)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device).to(dtype)

    keys = (case.heads, tokens, case.metric_dim) if case.heads else (tokens, case.metric_dim)
    metric = normal(batch, *keys)
    if case.op.endswith("_match"):
        return Inputs(metric)
    x = normal(batch, tokens, channels)
    size = torch.randint(1, LARGEST_SIZE + 1, (batch, tokens, 1), generator=generator, device=case.device).float()
    plan = published.bipartite_plan(metric, case.r, class_token=True)
    token_map = tk.TokenMap.from_dest(published.destinations(plan, out, tokens), out)
    inputs = Inputs(metric, x, size, size.to(dtype), plan, token_map, normal(batch, out, channels))
    token_map.views()  # a selector leaves a map with both views; making them is not the movers' work
    if case.training:
        moved = inputs.y if case.op == "unmerge" else inputs.x
        moved.requires_grad_()
        inputs.grad = normal(batch, tokens if case.op == "unmerge" else out, channels)
    if case.op == "then":
        inputs.second_plan = published.bipartite_plan(normal(batch, out, case.metric_dim), case.r, class_token=True)
        last = out - case.r
        inputs.second_map = tk.TokenMap.from_dest(published.destinations(inputs.second_plan, last, out), last)
        inputs.source = published.merge_source(plan.merge, x)
    return inputs


def windows(case: Case) -> Windows:
    """How the case's grid is cut."""
    return Windows(case.prefix, *case.grid, *case.window)


def every_other_source(case: Case, r: int) -> Partition:
    """ToMe's split, with a class token, when `r` tokens merge."""
    partition = every_other(case.shape[1], r, None, True, False)
    assert partition is not None  # no case asks for nothing
    return partition


def _draw_picture(case: Case, generator: torch.Generator) -> Inputs:
    """Neighbours are alike, here more and there less, as a picture's patches are: a fair share of them can merge."""
    channels = case.shape[2] if case.op in WINDOW_OPS else case.metric_dim
    tokens = _picture(case, channels, generator).to(getattr(torch, case.dtype))
    if case.op in WINDOW_OPS:
        return Inputs(x=tokens, threshold=_halfway(proofs.window_cosines(tokens, windows(case)), case.r))
    if case.op == "grid_bipartite_match":
        return Inputs(tokens)
    best = proofs.best_cosines(tokens, every_other_source(case, case.r))
    above = _halfway(best, case.r) - float(best.mean(1).mean())
    if above <= 0:
        raise ValueError(f"{case.name}: r must be less, for these tokens to lie above the mean similarity")
    return Inputs(tokens, layer_index=float(best.std(1).mean()) / above)


def _picture(case: Case, channels: int, generator: torch.Generator) -> Tensor:
    """(B, N, C) float32: leading tokens, and a grid of something smooth and a texture of varying strength."""
    batch, height, width = case.shape[0], *case.grid

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device)

    def smooth(channels: int) -> Tensor:
        coarse = normal(batch, channels, height // SMOOTH_OVER + 2, width // SMOOTH_OVER + 2)
        return F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)

    # All strengths evenly, so that images differ in where they are textured, and little in how many tokens can merge.
    ranked = smooth(1).flatten(1).argsort(1).argsort(1).view(batch, 1, height, width)
    strength = TEXTURE * (ranked + 1) / (height * width)
    picture = smooth(channels) + strength * normal(batch, channels, height, width)
    return torch.cat([normal(batch, case.prefix, channels), picture.flatten(2).transpose(1, 2)], 1)


def _halfway(score: Tensor, r: int) -> float:
    """The threshold that `r` of `score` (B, S) reach in the image where the fewest do: halfway to the next of them."""
    ordered = score.sort(1, descending=True).values
    image = int(ordered[:, r - 1].argmin())
    return float(ordered[image, r - 1 : r + 1].mean())
