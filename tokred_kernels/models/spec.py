# SPDX-License-Identifier: MIT
"""What a method can ask about a model, and the names of the attributes that a patch adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

PATCH_INFO = "tokred_patch"  # of a patched model: a `PatchInfo`
TRACE = "tokred_trace"  # of a patched model: the `ForwardTrace` of its last forward
REDUCER = "tokred_reducer"  # of a patched block: a `BlockReducer`

# The supported models of each library; `base.py` describes the adapters.
SUPPORTED = {
    "timm": (
        "timm's VisionTransformer and VisionTransformerDistilled, made of timm's Block and Attention, and Eva (EVA, "
        "DINOv3, Perception Encoder), made of EvaBlock"
    ),
    "transformers": (
        "transformers' ViT, DeiT, DINOv2 (with registers or without), DINOv3 ViT, CLIP, MetaCLIP 2, SigLIP, I-JEPA and "
        "ViT-MSN, on their own, in image classifiers and in two-tower models"
    ),
}
OWN_BLOCK = "write a block of your own with tokred_kernels.bipartite_match and merge_wavg"


class BlockSpec(NamedTuple):
    """A block's attention, MLP, embedding dimension, inner dimension of all heads together, and head dimension."""

    attention: Any
    mlp: Any
    embed_dim: int
    inner_dim: int
    head_dim: int


class ModelSpec(NamedTuple):
    """The facts about a model that the methods use.

    Attributes:
        model: the module that runs the blocks, and to which a method adds its modules.
        blocks: the transformer blocks, in order.
        block_specs: a BlockSpec for each block.
        num_patches: patches of an image of the model's size; None if the patch embedding does not define it.
        num_prefix: how many tokens come before the patches.
        has_class_token: whether the first of them is a class token.
        embed_dim: C.
        grid: (rows, columns) of the patches of an image of the model's size; None if images can have any size.
        gridless_embed: None, or the class name of a patch embedding that does not define a grid.
        supports_packing: whether the model can run on packed tokens (T, C).
        pool: how the model pools its tokens, for messages.
        pools_masked: whether this pooling can ignore masked tokens.
    """

    model: Any
    blocks: Sequence[Any]
    block_specs: tuple[BlockSpec, ...]
    num_patches: int | None
    num_prefix: int
    has_class_token: bool
    embed_dim: int
    grid: tuple[int, int] | None
    gridless_embed: str | None
    supports_packing: bool
    pool: str
    pools_masked: bool


def check_not_replaced(root: nn.Module, kinds: tuple[type[nn.Module], ...], advice: str) -> None:
    """Raise RuntimeError if a module of these classes has its own `forward`, which hides that of its class."""
    for name, module in root.named_modules():
        if type(module) in kinds and "forward" in vars(module):
            raise RuntimeError(
                f"tokred_kernels: the forward of {name or type(root).__name__} has been replaced, as offloading hooks "
                f"and caches do; {advice}"
            )
