# SPDX-License-Identifier: MIT
"""timm's supported models and their parts; `models/base.py` describes the functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokred_kernels.models.imports import import_timm
from tokred_kernels.models.patched import PatchInfo
from tokred_kernels.models.reducer import BlockReducer
from tokred_kernels.models.spec import (
    OWN_BLOCK,
    PATCH_INFO,
    REDUCER,
    SUPPORTED,
    TRACE,
    BlockSpec,
    ModelSpec,
    check_not_replaced,
)
from tokred_kernels.models.state import ForwardTrace
from tokred_kernels.models.timm.eva import PatchedAttentionRope, PatchedEva, PatchedEvaAttention, PatchedEvaBlock
from tokred_kernels.models.timm.patched import MASKED_POOLS, has_grid, head_dim
from tokred_kernels.models.timm.vit import (
    PatchedAttention,
    PatchedBlock,
    PatchedVisionTransformer,
    PatchedVisionTransformerDistilled,
)

import_timm()

from timm.layers import AttentionPoolLatent  # noqa: E402

BLOCKS = {kind.original: kind for kind in (PatchedBlock, PatchedEvaBlock)}
ATTENTIONS = {kind.original: kind for kind in (PatchedAttention, PatchedEvaAttention, PatchedAttentionRope)}
PATCHED = {kind.original: kind for kind in (PatchedVisionTransformer, PatchedVisionTransformerDistilled, PatchedEva)}


def supports(model: Any) -> bool:
    """Return whether the class of an unpatched model is supported."""
    return type(model) in PATCHED


def model_spec(model: Any) -> ModelSpec:
    """See `models.base`."""
    any_size = model.dynamic_img_size or not has_grid(model)
    return ModelSpec(
        model,
        model.blocks,
        tuple(map(_block_spec, model.blocks)),
        getattr(model.patch_embed, "num_patches", None),
        model.num_prefix_tokens,
        has_class_token=model.cls_token is not None,
        embed_dim=model.embed_dim,
        grid=None if any_size else model.patch_embed.grid_size,
        gridless_embed=None if has_grid(model) else type(model.patch_embed).__name__,
        supports_packing=True,
        pool=f"global_pool={model.global_pool!r}",
        pools_masked=model.global_pool in MASKED_POOLS and model.attn_pool is None,
    )


def _block_spec(block: Any) -> BlockSpec:
    projection = block.attn.proj
    return BlockSpec(block.attn, block.mlp, projection.out_features, projection.in_features, head_dim(block.attn))


def check(model: Any) -> None:
    """Raise NotImplementedError unless this adapter supports all parts of the model."""
    for index, block in enumerate(model.blocks):
        for name, part, known in (("", block, BLOCKS), (".attn", getattr(block, "attn", None), ATTENTIONS)):
            if type(part) not in known:
                raise NotImplementedError(
                    f"tokred_kernels.patch: blocks.{index}{name} of this {type(model).__name__} is a "
                    f"{type(part).__module__}.{type(part).__name__}, which is not supported; supported are "
                    f"{SUPPORTED['timm']}. You can {OWN_BLOCK}"
                )
    check_not_replaced(model, (*BLOCKS, *ATTENTIONS), "patch the model first, and add those afterwards")
    if getattr(model, "rope_mixed", False):
        raise NotImplementedError(
            "tokred_kernels.patch: the model has its own rotary positions for each block and head "
            '(rope_type="mixed"), which is not supported: every merged token would need as many. Supported are '
            'positions that all blocks share ("cat", "dinov3", "mrope")'
        )
    pool = model.attn_pool
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        raise NotImplementedError(
            f"tokred_kernels.patch: the model pools its tokens by {type(pool).__name__}, which needs every token at "
            'its position; supported are global_pool="token", "avg", "avgmax", "max", "", and "map" without a position '
            "embedding. You can make the model with another global_pool, or with num_classes=0 and global_pool=''"
        )


def install(model: Any, info: PatchInfo, reducers: Callable[[int], BlockReducer]) -> None:
    """See `models.base`."""
    for index, block in enumerate(model.blocks):
        block.attn.__class__ = ATTENTIONS[type(block.attn)]
        block.__class__ = BLOCKS[type(block)]
        setattr(block, REDUCER, reducers(index))
    setattr(model, PATCH_INFO, info)
    setattr(model, TRACE, ForwardTrace())
    model.__class__ = PATCHED[type(model)]
