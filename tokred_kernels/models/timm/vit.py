# SPDX-License-Identifier: MIT
"""Patched classes of timm's VisionTransformer, and of DeiT with a distillation token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokred_kernels.models.imports import import_timm
from tokred_kernels.models.state import TokenState
from tokred_kernels.models.timm.patched import PatchedPreNormBlock, PatchedSelfAttention, PatchedTransformer
from tokred_kernels.nn.pooling import leading_tokens

import_timm()

from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import Attention, Block, VisionTransformer  # noqa: E402


class PatchedAttention(PatchedSelfAttention, Attention):  # type: ignore[misc]
    """timm's Attention."""

    original = Attention


class PatchedBlock(PatchedPreNormBlock, Block):  # type: ignore[misc]
    """timm's Block."""

    original = Block

    def scale(self, branch: int, x: Tensor) -> Tensor:
        """See `PatchedPreNormBlock`."""
        return self.ls1(x) if branch == 1 else self.ls2(x)


class PatchedVisionTransformer(PatchedTransformer, VisionTransformer):
    """timm's VisionTransformer."""

    original: type[nn.Module] = VisionTransformer

    def embed(self, x: Tensor) -> tuple[Tensor, None]:
        """See `PatchedTransformer`."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x)))), None


class PatchedVisionTransformerDistilled(PatchedVisionTransformer, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled."""

    original: type[nn.Module] = VisionTransformerDistilled

    def _head(self, x: Tensor, state: TokenState | None, pre_logits: bool = False) -> Any:
        if state is not None and state.packing is not None:
            x = leading_tokens(x, state.packing, self.num_prefix_tokens)
        return VisionTransformerDistilled.forward_head(self, x, pre_logits)
