# SPDX-License-Identifier: MIT
"""Find the transformer blocks of diffusers' models, and by how much their grids are downsampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tokred_kernels.models.imports import import_diffusers

import_diffusers()

from diffusers.models.attention import BasicTransformerBlock  # noqa: E402
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel  # noqa: E402
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel  # noqa: E402
from diffusers.models.transformers.transformer_2d import Transformer2DModel  # noqa: E402
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # noqa: E402

# The modules that turn a feature map into tokens, and run `transformer_blocks` on these.
TRANSFORMERS = (Transformer2DModel, DiTTransformer2DModel, PixArtTransformer2DModel)
SUPPORTED = (
    "diffusers' UNet2DConditionModel, DiTTransformer2DModel, PixArtTransformer2DModel and Transformer2DModel, whose "
    "blocks are diffusers' BasicTransformerBlock"
)


def transformers_within(root: nn.Module, max_downsample: int) -> list[Any]:
    """Return the transformers in `root` that are downsampled by at most this factor; raise if there are none."""
    if not isinstance(root, UNet2DConditionModel) and type(root) not in TRANSFORMERS:
        models = (UNet2DConditionModel, DiTTransformer2DModel, PixArtTransformer2DModel)
        inner = next((module for module in root.modules() if isinstance(module, models)), None)
        advice = "" if inner is None else f". Patch the {type(inner).__name__} inside it, before anything wraps it"
        raise NotImplementedError(
            f"tokred_kernels.patch: nothing was patched: {type(root).__module__}.{type(root).__name__} is not "
            f"supported; supported are {SUPPORTED}{advice}"
        )
    found = list(downsampled(root))
    if not found:
        raise NotImplementedError(
            f"tokred_kernels.patch: nothing was patched: this {type(root).__name__} has no known transformer blocks; "
            f"supported are {SUPPORTED}"
        )
    finest = min(factor for _, factor in found)
    if finest > max_downsample:
        raise ValueError(
            f"tokred_kernels.patch: nothing was patched: max_downsample must be at least {finest} here, because "
            f"all transformer blocks of this model run at 1/{finest} of the latent's size or less, got {max_downsample}"
        )
    return [transformer for transformer, factor in found if factor <= max_downsample]


def downsampled(root: Any) -> Iterator[tuple[Any, int]]:
    """Yield the transformers in `root`, each with the factor between the grid of the latent's patches and its own."""
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
    """Return the blocks of a transformer; raise unless all of them are supported.

    Only exact classes are supported: patching would silently discard what a subclass overrides.
    """
    if transformer.config.get("num_vector_embeds") is not None:
        raise NotImplementedError("tokred_kernels.patch: a Transformer2DModel on discrete latents is not supported")
    for index, block in enumerate(transformer.transformer_blocks):
        if type(block) is not BasicTransformerBlock:
            raise NotImplementedError(
                f"tokred_kernels.patch: transformer_blocks.{index} of a {type(transformer).__name__} is a "
                f"{type(block).__module__}.{type(block).__name__}, which is not supported; supported are {SUPPORTED}"
            )
    return list(transformer.transformer_blocks)
