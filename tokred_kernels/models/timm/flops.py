# SPDX-License-Identifier: MIT
"""FLOPs of timm's models outside their blocks, for `tokred_kernels.flops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tokred_kernels.models.imports import import_timm
from tokred_kernels.models.timm.patched import first_pooled
from tokred_kernels.nn.flops import counter, linear_flops

import_timm()

from timm.layers import PatchEmbed  # noqa: E402


def image_size(model: Any) -> tuple[int, int]:
    """Return the (height, width) of the images that the model was made for."""
    return tuple(model.patch_embed.img_size)


def grid(model: Any, pixels: tuple[int, int]) -> tuple[int, int]:
    """Return the (rows, columns) of patches; raise ValueError if the model does not accept this image size."""
    embed = model.patch_embed
    if embed.strict_img_size and pixels != tuple(embed.img_size):
        raise ValueError(
            f"tokred_kernels.flops.count: the model accepts only images of {tuple(embed.img_size)} pixels, got "
            f"{pixels}; make it with dynamic_img_size=True, or call its set_input_size"
        )
    return embed.dynamic_feat_size(pixels)


def patch_embed(model: Any, pixels: tuple[int, int], grid: tuple[int, int]) -> int:
    """Return the FLOPs of the patch embedding."""
    embed = model.patch_embed
    if type(embed) is PatchEmbed:
        return grid[0] * grid[1] * 2 * embed.proj.weight.numel()
    # Others can be whole networks, as in hybrid models: run them on the meta device and count.
    parts = {name: part.to("meta") for name, part in (*embed.named_parameters(), *embed.named_buffers())}
    first = next(part for part in embed.modules() if isinstance(part, nn.Conv2d))
    image = torch.empty(1, first.in_channels, *pixels, dtype=first.weight.dtype, device="meta")
    with torch.no_grad(), counter(display=False) as counted:
        torch.func.functional_call(embed, parts, (image,))
    return counted.get_total_flops()


def head(model: Any, tokens: int) -> int:
    """Return the FLOPs of pooling `tokens` tokens, and of the head."""
    per_image = linear_flops(model.head) + (linear_flops(model.head_dist) if hasattr(model, "head_dist") else 0)
    pool = model.attn_pool
    if pool is None:
        # Without pooling, the head runs on every token.
        return per_image * (1 if model.global_pool else tokens)
    pooled = tokens - first_pooled(model)
    latents = pool.latent_len
    attended = pooled * linear_flops(pool.kv) + 4 * latents * pooled * pool.num_heads * pool.head_dim
    return per_image + attended + latents * (linear_flops(pool) - linear_flops(pool.kv))
