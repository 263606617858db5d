# SPDX-License-Identifier: MIT
"""FLOPs of transformers' models outside their layers, for `tokred_kernels.flops`."""

from __future__ import annotations

from typing import Any

from torch import nn

from tokred_kernels.models.transformers.adapter import encoder_of, has_probe
from tokred_kernels.models.transformers.patched import grid_of, sides
from tokred_kernels.nn.flops import linear_flops

TEXT = ("text_model", "text_projection")  # in two-tower models


def image_size(model: Any) -> tuple[int, int]:
    """Return the (height, width) of the images that the model was made for."""
    return sides(encoder_of(model).config.image_size)


def grid(model: Any, pixels: tuple[int, int]) -> tuple[int, int]:
    """Return the (rows, columns) of patches; every size is accepted, as with `interpolate_pos_encoding=True`."""
    return grid_of(encoder_of(model).config, pixels)


def patch_embed(model: Any, pixels: tuple[int, int], grid: tuple[int, int]) -> int:
    """Return the FLOPs of the patch embedding."""
    embeddings = encoder_of(model).embeddings
    (projection,) = (part for part in embeddings.modules() if isinstance(part, nn.Conv2d))
    return grid[0] * grid[1] * 2 * projection.weight.numel()


def head(model: Any, tokens: int) -> int:
    """Return the FLOPs of pooling `tokens` tokens, and of the heads, which run once."""
    encoder = encoder_of(model)
    around = [] if model is encoder else [part for name, part in model.named_children() if name not in TEXT]
    parts = [part for part in (*around, getattr(encoder, "pooler", None)) if part not in (None, encoder)]
    probe = encoder.head if has_probe(encoder) else None
    return sum(map(linear_flops, parts)) + (0 if probe is None else _probe(probe, tokens))


def _probe(probe: Any, tokens: int) -> int:
    """Return the FLOPs of attention from one query to all tokens, and of the layers after it."""
    width = probe.attention.embed_dim
    keys_and_values, scores_and_mean = 4 * width * width, 4 * width
    return linear_flops(probe) + 2 * width * width + tokens * (keys_and_values + scores_and_mean)
