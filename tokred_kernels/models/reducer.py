# SPDX-License-Identifier: MIT
"""What a method does in one block: the interface between the methods and the patched blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokred_kernels.models.rope import merge_rope
from tokred_kernels.models.spec import REDUCER, BlockSpec
from tokred_kernels.models.state import TokenState
from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.ops.merge_wavg import merge_wavg
from tokred_kernels.token_map import TokenMap


@dataclass(frozen=True)
class BlockReducer:
    """The token reduction of one block. Every patched block has a reducer; this base class removes nothing.

    Attributes:
        prop_attn: whether attention weighs each key by its token's size.
    """

    prop_attn: bool = False

    def resolve(self, block: Any) -> BlockReducer:
        """Return the reducer with the settings that it reads from `block`, if it learns them there."""
        return self

    def needed_importance(self, tokens: int) -> str | None:
        """Return the `importance` argument for the block's attention over `tokens` tokens; see `token_attention`."""
        return None

    def before_block(self, model: Any, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState, TokenMap | None]:
        """Reduce x (B, N, C), or packed (T, C), before the block; return the tokens, their state and the map."""
        return x, state, None

    def reduce(
        self, block: Any, x: Tensor, keys: Tensor, importance: Tensor | None, state: TokenState
    ) -> tuple[Tensor, TokenState, TokenMap | None]:
        """Reduce the tokens between attention and MLP; by default, merge along `match` and track sizes.

        Args:
            block: the block.
            x: (B, N, C), or packed (T, C), the tokens after the attention residual.
            keys: (B, H, N, d), or (T, H, d), the keys of that attention.
            importance: (B, N), or (T,), if `needed_importance` requested it; else None.
            state: the state of these tokens.

        Returns:
            The tokens that leave, their state, and the map; None instead of a map if all tokens stay.
        """
        token_map = self.match(x, keys, state)
        if token_map is None:
            return x, state, None
        rope = merge_rope(state.rope, token_map, state.size)
        x, size = merge_wavg(x, token_map, state.size)
        return x, namedtuple_replace(state, size=size, grid=None, packing=token_map.packed, rope=rope), token_map

    def match(self, x: Tensor, keys: Tensor, state: TokenState) -> TokenMap | None:
        """Return the map to merge along between attention and MLP; None if all tokens stay."""
        return None

    def tokens_attended(self, tokens: int, grid: tuple[int, int]) -> int | None:
        """Return how many of an image's `tokens` tokens the attention processes; None if that depends on the image.

        `grid` is the grid of the patches that entered the first block.
        """
        return tokens

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int | None:
        """Return how many of the `tokens` tokens of the attention leave the block; None if the image decides."""
        return tokens

    def selection_flops(self, entering: int, attended: int, spec: BlockSpec) -> int:
        """Return the FLOPs per image of selecting tokens, if `entering` tokens enter and `attended` of them attend."""
        return 0


def reducer_of(block: Any) -> BlockReducer:
    """Return the block's reducer with its current settings; for an unpatched block, one that removes nothing."""
    return getattr(block, REDUCER, BlockReducer()).resolve(block)
