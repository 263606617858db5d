# SPDX-License-Identifier: MIT
"""ToMe in timm's VisionTransformer: merging between attention and MLP (ToMe, section 3)."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tokred_kernels.ops.bipartite_match import bipartite_match
from tokred_kernels.ops.merge_wavg import merge_wavg
from tokred_kernels.patch import timm_vit
from tokred_kernels.patch.schedule import removed_per_block
from tokred_kernels.patch.timm_vit import Block, Mark, Patched
from tokred_kernels.token_map import TokenMap


class Step(NamedTuple):
    """What one block does: merge `r` tokens, of which the first `num_prefix` are protected."""

    r: int
    num_prefix: int
    proportional: bool

    def joining(self, tokens: int) -> int:
        """How many of `tokens` tokens merge: `r`, or half of the unprotected ones where that is less."""
        return min(self.r, max(tokens - self.num_prefix, 0) // 2)


class ToMeBlock(Patched, Block):
    """timm's Block with a merge between attention and MLP."""

    original = Block
    tokred_step: Step

    def forward(  # type: ignore[override]
        self, x: Tensor, size: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, TokenMap | None]:
        """x (B, N, C) and sizes (B, N, 1), None for 1 each, to (B, N', C), (B, N', 1) and the map that was followed."""
        step = self.tokred_step
        attended, keys = self.attn(self.norm1(x), size if step.proportional else None)
        x = x + self.drop_path1(self.ls1(attended))
        token_map = None
        if step.joining(x.shape[1]) > 0:
            token_map = bipartite_match(keys, step.r, num_prefix=step.num_prefix)
            x, size = merge_wavg(x, token_map, size)
        del attended, keys  # the keys are a view of all of qkv, which would else live on through the MLP
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x, size, token_map

    def tokens_after(self, tokens: int) -> int:
        """How many of `tokens` tokens leave this block."""
        return tokens - self.tokred_step.joining(tokens)

    def match_flops(self, tokens: int) -> int:
        """The floating-point operations of choosing, an image: the product of sources and destinations, if any."""
        if self.tokred_step.joining(tokens) == 0:
            return 0
        head_dim: Any = self.attn.head_dim
        return 2 * (tokens - tokens // 2) * (tokens // 2) * head_dim


def apply(model: Any, *, r: Any, prop_attn: bool = True, trace: bool = True) -> None:
    """See `patch`."""
    for name, value in (("prop_attn", prop_attn), ("trace", trace)):
        if not isinstance(value, bool):
            raise TypeError(f"tokred_kernels.patch: {name} must be True or False, got {value!r}")
    timm_vit.check(model)
    schedule = removed_per_block(r, len(model.blocks))
    prefix = model.num_prefix_tokens
    timm_vit.install(
        model,
        Mark("tome", {"r": r, "prop_attn": prop_attn, "trace": trace}),
        ToMeBlock,
        lambda index: Step(schedule[index], prefix, prop_attn),
    )
