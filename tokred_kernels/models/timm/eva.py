# SPDX-License-Identifier: MIT
"""Patched classes of timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder, and other ViTs with rotary positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred_kernels.models.imports import import_timm
from tokred_kernels.models.rope import prepend_prefix_rope
from tokred_kernels.models.timm.patched import PatchedPreNormBlock, PatchedSelfAttention, PatchedTransformer

import_timm()

from timm.layers import AttentionRope  # noqa: E402
from timm.models.eva import Eva, EvaAttention, EvaBlock  # noqa: E402


class PatchedEvaAttention(PatchedSelfAttention, EvaAttention):  # type: ignore[misc]
    """timm's EvaAttention."""

    original = EvaAttention

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """See `PatchedSelfAttention`; a joint layer of queries, keys and values has separate biases."""
        if self.qkv is None or self.q_bias is None:
            return super().heads(x)
        biases: Any = (self.q_bias, self.k_bias, self.v_bias)
        bias = torch.cat(biases)
        # As in timm: a separate addition rounds once more, which low precision shows.
        return self.split(self.qkv(x) + bias if self.qkv_bias_separate else F.linear(x, self.qkv.weight, bias))


class PatchedAttentionRope(PatchedSelfAttention, AttentionRope):  # type: ignore[misc]
    """timm's AttentionRope, which can have fewer heads of keys and values than of queries."""

    original = AttentionRope


class PatchedEvaBlock(PatchedPreNormBlock, EvaBlock):  # type: ignore[misc]
    """timm's EvaBlock."""

    original = EvaBlock

    def scale(self, branch: int, x: Tensor) -> Tensor:
        """See `PatchedPreNormBlock`."""
        gamma = self.gamma_1 if branch == 1 else self.gamma_2
        return x if gamma is None else gamma * x


class PatchedEva(PatchedTransformer, Eva):
    """timm's Eva."""

    original = Eva

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `PatchedTransformer`."""
        x, rope = self._pos_embed(self.patch_embed(x))
        if rope is not None:
            # After patch dropout, each image has its own positions, and there is a dimension for heads.
            rope = rope.squeeze(1) if rope.dim() == 4 else rope.unsqueeze(0)
            rope = prepend_prefix_rope(rope, self.num_prefix_tokens)
        return self.norm_pre(x), rope
