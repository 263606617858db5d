# SPDX-License-Identifier: MIT
"""Count the FLOPs of a LookupViT as `tokred_kernels.flops` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tokred_kernels.checks import MAX_ROWS, check_count
from tokred_kernels.nn.flops import Flops, linear_flops
from tokred_kernels.nn.lookupvit import LookupViT
from tokred_kernels.nn.lookupvit_resize import resize_flops

OP = "nn.lookupvit_flops"


def lookupvit_flops(
    model: LookupViT, img_size: int | Sequence[int] | None = None, grid: Sequence[int] | None = None
) -> Flops:
    """Count the FLOPs of a LookupViT for one image, from its shapes alone.

    Scores between compressed and lookup tokens count twice, because they are computed twice: for the gather and for the
    scatter. Papers count multiply-adds, which are `Flops.macs`.

    Args:
        model: a LookupViT.
        img_size: pixels, in the format of the model's `img_size`; default the model's own.
        grid: the compressed grid; default the model's own.

    Returns:
        `patch_embed` includes the resizing to compressed tokens, without that of the positions, which does not depend
        on the image. `head` has both heads. `tokens` has the sum of lookup and compressed tokens for every block.

    Raises:
        TypeError, ValueError: a wrong model, size or grid.
    """
    if not isinstance(model, LookupViT):
        raise TypeError(f"tokred_kernels.{OP}: model must be a LookupViT, got {type(model).__name__}")
    lookup_grid = model.lookup_grid_of(_pixels(model, img_size))
    compressed_grid = model.compressed_grid(model.grid if grid is None else grid, lookup_grid)
    compressed, lookup = math.prod(compressed_grid), math.prod(lookup_grid)
    embed = 2 * lookup * model.patch_embed.proj.weight.numel() + resize_flops(
        model.embed_dim, lookup_grid, compressed_grid
    )
    head = linear_flops(model.head) + linear_flops(model.head_lookup)
    per_block = tuple(_block(block, compressed, lookup) for block in model.blocks)
    return Flops(per_block, embed, head, (compressed + lookup,) * (len(per_block) + 1))


def _block(block: Any, compressed: int, lookup: int) -> int:
    dim = block.norm1.normalized_shape[0]
    on_compressed = (block.gather.q, block.gather.proj, block.attn, block.mlp, block.scatter.v)
    on_lookup = (block.gather.kv, block.scatter.proj, block.mlp_lookup)
    linear = compressed * sum(map(linear_flops, on_compressed)) + lookup * sum(map(linear_flops, on_lookup))
    # Two matrix products each for gather, scatter and self attention.
    return linear + 8 * compressed * lookup * dim + 4 * compressed * compressed * dim


def _pixels(model: LookupViT, img_size: Any) -> tuple[int, ...]:
    if img_size is None:
        return model.img_size
    size = tuple(img_size) if isinstance(img_size, (tuple, list)) else (img_size,) * len(model.img_size)
    size = tuple(check_count(OP, "img_size", pixels, most=MAX_ROWS) for pixels in size)
    if size != model.img_size and not model.dynamic_img_size:
        raise ValueError(
            f"tokred_kernels.{OP}: the model accepts only images of {model.img_size} pixels, got {size}; make it with "
            "dynamic_img_size=True"
        )
    return size
