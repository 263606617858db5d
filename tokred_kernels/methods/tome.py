# SPDX-License-Identifier: MIT
"""ToMe in ViTs: merging between attention and MLP (ToMe, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokred_kernels.methods.schedule import removed_per_block
from tokred_kernels.models import base as models
from tokred_kernels.models.base import Parts
from tokred_kernels.models.patched import Mark
from tokred_kernels.models.state import State, Step
from tokred_kernels.ops.bipartite_match import bipartite_match
from tokred_kernels.token_map import TokenMap


@dataclass(frozen=True)
class MergeSimilar(Step):
    """What one block does: merge `r` tokens by their keys, of which the first `num_prefix` are protected."""

    r: int = 0
    num_prefix: int = 0

    def joining(self, tokens: int) -> int:
        """How many of `tokens` tokens merge: `r`, or half of the unprotected ones where that is less."""
        return min(self.r, max(tokens - self.num_prefix, 0) // 2)

    def match(self, x: Tensor, keys: Tensor, state: State) -> TokenMap | None:
        """See `Step`."""
        if self.joining(x.shape[1]) == 0:
            return None
        return bipartite_match(keys, self.r, num_prefix=self.num_prefix)

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int:
        """See `Step`."""
        return tokens - self.joining(tokens)

    def choice_flops(self, entering: int, attended: int, parts: Parts) -> int:
        """See `Step`: the product of sources and destinations, if any."""
        tokens = attended
        if self.joining(tokens) == 0:
            return 0
        return 2 * (tokens - tokens // 2) * (tokens // 2) * parts.head_width


def apply(model: Any, *, r: Any, prop_attn: bool = True, trace: bool = True) -> None:
    """Merge the most similar tokens in each block of a ViT, by their keys.

    Args:
        model: the ViT.
        r: how many tokens each block removes (at most half of the unprotected ones: more is cut to that). An int for
            every block; a list with one number a block (ToMe's authors pad a shorter one with zeros; here it raises);
            or `(r, inflect)`, a number that changes linearly over the blocks with the same sum: inflect -1 falls from
            2 r to 0, +1 rises from 0 to 2 r, 0 is constant, as in ToMe.
        prop_attn: True (default) lets keys count as often as the tokens they stand for. For models trained without
            merging. False for MAE pretraining, and for models trained with merging.
        trace: True (default) keeps the maps of the last forward, for `model.token_map`.

    Raises as `patch` says.
    """
    models.check_switches(prop_attn=prop_attn, trace=trace)
    anatomy = models.examine(model)
    schedule = removed_per_block(r, len(anatomy.blocks))
    prefix = anatomy.num_prefix
    models.install(
        model,
        Mark("tome", {"r": r, "prop_attn": prop_attn, "trace": trace}),
        lambda index: MergeSimilar(prop_attn, schedule[index], prefix),
    )
