# SPDX-License-Identifier: MIT
"""Which of timm's models can be patched, and of which parts; `models.py` says what an adapter has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokred_kernels.models.base import OWN_BLOCK, SUPPORTED, ModelSpec, Parts
from tokred_kernels.models.imports import import_timm
from tokred_kernels.models.patched import RECORD, STEP, Mark
from tokred_kernels.models.replaced import refuse_replaced
from tokred_kernels.models.state import Record, Step
from tokred_kernels.models.timm.eva import PatchedAttentionRope, PatchedEva, PatchedEvaAttention, PatchedEvaBlock
from tokred_kernels.models.timm.patched import MASKED_POOLS, has_grid, head_width
from tokred_kernels.models.timm.vit import (
    PatchedAttention,
    PatchedBlock,
    PatchedVisionTransformer,
    PatchedVisionTransformerDistilled,
)
from tokred_kernels.patching import MARK

import_timm()

from timm.layers import AttentionPoolLatent  # noqa: E402

BLOCKS = {kind.original: kind for kind in (PatchedBlock, PatchedEvaBlock)}
ATTENTIONS = {kind.original: kind for kind in (PatchedAttention, PatchedEvaAttention, PatchedAttentionRope)}
PATCHED = {kind.original: kind for kind in (PatchedVisionTransformer, PatchedVisionTransformerDistilled, PatchedEva)}


def supports(model: Any) -> bool:
    """Whether `model`, not patched, is of a class that can be."""
    return type(model) in PATCHED


def anatomy(model: Any) -> ModelSpec:
    """See `models.anatomy`."""
    any_size = model.dynamic_img_size or not has_grid(model)
    return ModelSpec(
        model,
        model.blocks,
        tuple(map(_parts, model.blocks)),
        getattr(model.patch_embed, "num_patches", None),
        model.num_prefix_tokens,
        class_token=model.cls_token is not None,
        width=model.embed_dim,
        grid=None if any_size else model.patch_embed.grid_size,
        gridless=None if has_grid(model) else type(model.patch_embed).__name__,
        packs=True,
        pool=f"global_pool={model.global_pool!r}",
        heeds_policy=model.global_pool in MASKED_POOLS and model.attn_pool is None,
    )


def _parts(block: Any) -> Parts:
    width = block.attn.proj.out_features
    return Parts(block.attn, block.mlp, width, block.attn.proj.in_features, head_width(block.attn))


def check(model: Any) -> None:
    """Raise NotImplementedError unless all parts are what this adapter was written for."""
    for index, block in enumerate(model.blocks):
        for name, part, known in (("", block, BLOCKS), (".attn", getattr(block, "attn", None), ATTENTIONS)):
            if type(part) not in known:
                raise NotImplementedError(
                    f"tokred_kernels.patch: blocks.{index}{name} of this {type(model).__name__} is a "
                    f"{type(part).__module__}.{type(part).__name__}, which is not supported; {SUPPORTED['timm']} are. "
                    f"You can {OWN_BLOCK}"
                )
    refuse_replaced(model, (*BLOCKS, *ATTENTIONS), "patch the model first, and put those on after")
    if getattr(model, "rope_mixed", False):
        raise NotImplementedError(
            "tokred_kernels.patch: the model has rotary positions of their own for each block and head "
            '(rope_type="mixed"), which is not supported: merged tokens would have to carry as many. Supported are '
            'those that all blocks share ("cat", "dinov3", "mrope")'
        )
    pool = model.attn_pool
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        raise NotImplementedError(
            f"tokred_kernels.patch: the model pools its tokens by {type(pool).__name__}, which needs all of them in "
            'place; supported are global_pool="token", "avg", "avgmax", "max", "", and "map" without a position '
            "embedding. You can make the model with another global_pool, or with num_classes=0 and global_pool=''"
        )


def install(model: Any, mark: Mark, steps: Callable[[int], Step]) -> None:
    """See `models.install`."""
    for index, block in enumerate(model.blocks):
        block.attn.__class__ = ATTENTIONS[type(block.attn)]
        block.__class__ = BLOCKS[type(block)]
        setattr(block, STEP, steps(index))
    setattr(model, MARK, mark)
    setattr(model, RECORD, Record())
    model.__class__ = PATCHED[type(model)]
