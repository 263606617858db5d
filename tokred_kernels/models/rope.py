# SPDX-License-Identifier: MIT
"""Rotary positions (RoPE) of tokens that stand for several.

A rotary model turns queries and keys by where their tokens are, so that a score depends on how far apart they are. A
merged token is in several places: it is turned by the mean of its members' rotations, each counting as it does in the
merge. As rotations enter a score linearly, a merged key's score is then the mean of the scores that it has in the
places of its members. What is far from one another loses the high frequencies, and is compared by content.

Where keys say what merges, they do so as queries meet them: rotated, so that of tokens with like contents near ones
merge first, whose rotations differ least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.ops.merge import merge
from tokred_kernels.token_map import TokenMap


def of_all_tokens(rope: Tensor, num_prefix: int) -> Tensor:
    """The sines and cosines of patches, (B, N, 2 d), with those of prefix tokens, which nothing turns, before."""
    width = rope.shape[-1] // 2
    still = torch.cat([rope.new_zeros(width), rope.new_ones(width)])
    return torch.cat([still.expand(rope.shape[0], num_prefix, -1), rope], 1)


def moved(rope: Tensor | None, token_map: TokenMap, weight: Tensor | None = None) -> Tensor | None:
    """`State.rope` of the tokens that leave along `token_map`, by `weight` (B, N, 1), or (T, 1); None without one."""
    if rope is None:
        return None
    if rope.dim() == 3:  # not packed
        rope = rope.expand(token_map.batch, -1, -1)
    return merge(rope, token_map, weight=weight)
