# SPDX-License-Identifier: MIT
"""What transformers' models take around their layers, for `flops.py`."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokred_kernels.flops import linear_flops
from tokred_kernels.models.transformers.adapter import encoder_of, has_probe
from tokred_kernels.models.transformers.patched import grid_of, sides

TEXT = ("text_model", "text_projection")  # of models with two towers


def made_for(model: Any) -> tuple[int, int]:
    """Height and width of the images that the model was made for."""
    return sides(encoder_of(model).config.image_size)


def grid(model: Any, pixels: tuple[int, int]) -> tuple[int, int]:
    """Of patches, down and across. Any size will do: models that do not take others unless asked do when asked."""
    return grid_of(encoder_of(model).config, pixels)


def patch_embed(model: Any, pixels: tuple[int, int], grid: tuple[int, int]) -> int:
    """The operations of the patch embedding."""
    embeddings = encoder_of(model).embeddings
    (projection,) = (part for part in embeddings.modules() if isinstance(part, nn.Conv2d))
    return grid[0] * grid[1] * 2 * projection.weight.numel()


def head(model: Any, tokens: int) -> int:
    """The operations of pooling so many tokens, and of heads, which run once."""
    encoder = encoder_of(model)
    around = [] if model is encoder else [part for name, part in model.named_children() if name not in TEXT]
    parts = [part for part in (*around, getattr(encoder, "pooler", None)) if part not in (None, encoder)]
    probe = encoder.head if has_probe(encoder) else None
    return sum(map(linear_flops, parts)) + (0 if probe is None else _probe(probe, tokens))


def _probe(probe: Any, tokens: int) -> int:
    """Attention of one query to all tokens, and what follows."""
    width = probe.attention.embed_dim
    keys_and_values, scores_and_mean = 4 * width * width, 4 * width
    return linear_flops(probe) + 2 * width * width + tokens * (keys_and_values + scores_and_mean)
