# SPDX-License-Identifier: MIT
"""Rotary position embeddings (RoPE) of merged tokens.

A rotary model rotates queries and keys by the position of their token, so that a score depends on the distance of two
tokens. A merged token has several positions: it uses the mean of its members' rotations, weighted as in the merge. A
score is linear in the rotation, so the score of a merged key is the mean of the scores that it would have at the
positions of its members. If these are far apart, the high frequencies average out, and the content decides.

Methods that match keys use the rotated keys. Among tokens with similar content, neighbors then merge first; their
rotations differ least.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.ops.merge import merge
from tokred_kernels.token_map import TokenMap


def prepend_prefix_rope(rope: Tensor, num_prefix: int) -> Tensor:
    """Return the sines and cosines (B, N, 2 d) of the patches with those of unrotated prefix tokens before them."""
    width = rope.shape[-1] // 2
    identity = torch.cat([rope.new_zeros(width), rope.new_ones(width)])
    return torch.cat([identity.expand(rope.shape[0], num_prefix, -1), rope], 1)


def merge_rope(rope: Tensor | None, token_map: TokenMap, weight: Tensor | None = None) -> Tensor | None:
    """Return `TokenState.rope` of the output tokens, weighted by `weight` (B, N, 1) or (T, 1); None stays None."""
    if rope is None:
        return None
    if rope.dim() == 3:  # not packed
        rope = rope.expand(token_map.batch, -1, -1)
    return merge(rope, token_map, weight=weight)
