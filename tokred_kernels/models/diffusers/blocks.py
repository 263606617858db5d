# SPDX-License-Identifier: MIT
"""Finding the transformer blocks of diffusers' models, and how much smaller than the latent their grids are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tokred_kernels.models.diffusers.imports import import_diffusers
from tokred_kernels.patching import INSIDE

import_diffusers()

from diffusers.models.attention import BasicTransformerBlock  # noqa: E402
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel  # noqa: E402
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel  # noqa: E402
from diffusers.models.transformers.transformer_2d import Transformer2DModel  # noqa: E402
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # noqa: E402

# The modules that turn a feature map into tokens, for blocks of theirs called `transformer_blocks`.
TRANSFORMERS = (Transformer2DModel, DiTTransformer2DModel, PixArtTransformer2DModel)
SUPPORTED = (
    "diffusers' UNet2DConditionModel, DiTTransformer2DModel, PixArtTransformer2DModel and Transformer2DModel, whose "
    "blocks are diffusers' BasicTransformerBlock"
)


def resolve(model: Any) -> nn.Module:
    """The module that is patched: `model` itself, or what denoises in a pipeline, its unet or transformer.

    Raises:
        TypeError: there is none.
    """
    if isinstance(model, nn.Module):
        return model
    for name in INSIDE:
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            return part
    raise TypeError(
        "tokred_kernels.patch: model must be a torch.nn.Module, or a diffusers pipeline with a unet or a transformer, "
        f"got {type(model).__name__}"
    )


def transformers_within(root: nn.Module, max_downsample: int) -> list[Any]:
    """The transformers in `root` whose tokens are downsampled by at most that; raise unless there are any."""
    if not isinstance(root, UNet2DConditionModel) and type(root) not in TRANSFORMERS:
        whole = (UNet2DConditionModel, DiTTransformer2DModel, PixArtTransformer2DModel)
        inner = next((module for module in root.modules() if isinstance(module, whole)), None)
        advice = "" if inner is None else f". Patch the {type(inner).__name__} inside it, before anything wraps it"
        raise NotImplementedError(
            f"tokred_kernels.patch: nothing was patched: {type(root).__module__}.{type(root).__name__} is not "
            f"supported; {SUPPORTED}, are{advice}"
        )
    found = list(downsampled(root))
    if not found:
        raise NotImplementedError(
            f"tokred_kernels.patch: nothing was patched: this {type(root).__name__} has no transformer blocks that are "
            f"known; supported are {SUPPORTED}"
        )
    finest = min(factor for _, factor in found)
    if finest > max_downsample:
        raise ValueError(
            f"tokred_kernels.patch: nothing was patched: max_downsample must be at least {finest} here, for the "
            f"model's transformer blocks all see the latent at 1/{finest} of its size or less, got {max_downsample}"
        )
    return [transformer for transformer, factor in found if factor <= max_downsample]


def downsampled(root: Any) -> Iterator[tuple[Any, int]]:
    """The transformers in `root`, and by how much their grid is smaller than the latent, or its patches."""
    if type(root) in TRANSFORMERS:
        yield root, 1
        return
    factor = 1
    for stage in (*root.down_blocks, root.mid_block, *root.up_blocks):
        if stage is None:
            continue
        yield from ((module, factor) for module in stage.modules() if type(module) in TRANSFORMERS)
        if getattr(stage, "downsamplers", None):
            factor *= 2
        if getattr(stage, "upsamplers", None):
            factor //= 2


def blocks_of(transformer: Any) -> list[Any]:
    """The blocks of a transformer; raise unless this adapter was written for all of them.

    Exact classes, not derived ones: what a subclass overrides, a patch would overrule in silence.
    """
    if transformer.config.get("num_vector_embeds") is not None:
        raise NotImplementedError("tokred_kernels.patch: a Transformer2DModel of discrete latents is not supported")
    for index, block in enumerate(transformer.transformer_blocks):
        if type(block) is not BasicTransformerBlock:
            raise NotImplementedError(
                f"tokred_kernels.patch: transformer_blocks.{index} of a {type(transformer).__name__} is a "
                f"{type(block).__module__}.{type(block).__name__}, which is not supported; {SUPPORTED}, are"
            )
    return list(transformer.transformer_blocks)
