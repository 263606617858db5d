# SPDX-License-Identifier: MIT
"""Which of timm's models can be patched, and of which parts: what the methods call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokred_kernels.patch import MARK
from tokred_kernels.patch.replaced import refuse_replaced
from tokred_kernels.patch.state import Record, Step
from tokred_kernels.patch.timm_eva import PatchedAttentionRope, PatchedEva, PatchedEvaAttention, PatchedEvaBlock
from tokred_kernels.patch.timm_import import import_timm
from tokred_kernels.patch.timm_patched import RECORD, STEP, Mark
from tokred_kernels.patch.timm_vit import (
    PatchedAttention,
    PatchedBlock,
    PatchedVisionTransformer,
    PatchedVisionTransformerDistilled,
)

import_timm()

from timm.layers import AttentionPoolLatent  # noqa: E402

SUPPORTED = (
    "timm's VisionTransformer and VisionTransformerDistilled, made of timm's Block and Attention, and Eva (EVA, "
    "DINOv3, Perception Encoder), made of EvaBlock"
)
OWN_BLOCK = "write a block of your own with tokred_kernels.bipartite_match and merge_wavg"
BLOCKS = {kind.original: kind for kind in (PatchedBlock, PatchedEvaBlock)}
ATTENTIONS = {kind.original: kind for kind in (PatchedAttention, PatchedEvaAttention, PatchedAttentionRope)}
PATCHED = {kind.original: kind for kind in (PatchedVisionTransformer, PatchedVisionTransformerDistilled, PatchedEva)}


def check(model: Any) -> None:
    """Raise NotImplementedError unless `model` and all its parts are what this adapter was written for.

    Exact classes, not derived ones: what a subclass overrides, a patch would overrule in silence.
    """
    found = f"{type(model).__module__}.{type(model).__name__}"
    if type(model) not in PATCHED:
        wrapped = next((child for child in model.modules() if type(child) in PATCHED), None)
        advice = (
            OWN_BLOCK if wrapped is None else f"patch the {type(wrapped).__name__} inside it, before anything wraps it"
        )
        raise NotImplementedError(f"tokred_kernels.patch: {found} is not supported; {SUPPORTED} are. You can {advice}")
    for index, block in enumerate(model.blocks):
        for name, part, known in (("", block, BLOCKS), (".attn", getattr(block, "attn", None), ATTENTIONS)):
            if type(part) not in known:
                raise NotImplementedError(
                    f"tokred_kernels.patch: blocks.{index}{name} of this {type(model).__name__} is a "
                    f"{type(part).__module__}.{type(part).__name__}, which is not supported; {SUPPORTED} are. "
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


def check_switches(**switches: Any) -> None:
    """Raise TypeError unless each setting is True or False."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"tokred_kernels.patch: {name} must be True or False, got {value!r}")


def install(model: Any, mark: Mark, steps: Callable[[int], Step]) -> None:
    """Patch `model`, which `check` has passed: the block of each index does `steps(index)`."""
    for index, block in enumerate(model.blocks):
        block.attn.__class__ = ATTENTIONS[type(block.attn)]
        block.__class__ = BLOCKS[type(block)]
        setattr(block, STEP, steps(index))
    setattr(model, MARK, mark)
    setattr(model, RECORD, Record())
    model.__class__ = PATCHED[type(model)]
