# SPDX-License-Identifier: MIT
"""What travels with a patched model's tokens, and what a method does with them in one block."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tokred_kernels.token_map import Packing, TokenMap


class State(NamedTuple):
    """What travels with the tokens from block to block.

    Attributes:
        size: (B, N, 1) float32, or (T, 1), how many of the first tokens each token stands for; None for 1 each.
        grid: height and width of the patches after the prefix, as long as they are a grid: None once tokens have
            merged, or been dropped, and where the patch embedding does not tell.
        packing: where each image starts, once every image has a count of its own and x is (T, C); else None.
    """

    size: Tensor | None = None
    grid: tuple[int, int] | None = None
    packing: Packing | None = None


class Step(Protocol):
    """What a method does in one block; each block carries one."""

    @property
    def proportional(self) -> bool:
        """Whether keys count as often as the tokens they stand for."""

    def match(self, x: Tensor, keys: Tensor, state: State) -> TokenMap | None:
        """Where the tokens go between attention and MLP; None where all stay.

        Args:
            x: (B, N, C), or packed (T, C), the tokens after the attention residual.
            keys: (B, H, N, d), or (T, H, d), of that attention.
            state: of these tokens.
        """

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int | None:
        """How many of an image's `tokens` tokens leave the block; None where that depends on the image.

        `grid` is that of the patches when they entered the first block.
        """

    def match_flops(self, tokens: int, block: Any) -> int:
        """The floating-point operations of choosing, an image, where `tokens` tokens enter."""


class Record:
    """What the last forward did: its merges, its final state, and how many tokens there were where.

    A class, not a tuple, so that torch.export takes it for no tensor that a forward may not assign. It belongs to a
    forward, not to the model: copies and pickles of the model start without.

    Attributes:
        maps: of each merge; None where they are not kept.
        state: of the final tokens.
        entered: B, N and the device of the tokens that entered the first block.
        left: how many tokens left each block: N', or, of packed tokens, that of each image.
    """

    def __init__(
        self,
        maps: tuple[TokenMap, ...] | None = None,
        state: State = State(),  # noqa: B008  (it never changes)
        entered: tuple[int, int, torch.device] | None = None,
        left: tuple[int | tuple[int, ...], ...] = (),
    ) -> None:
        self.maps = maps
        self.state = state
        self.entered = entered
        self.left = left

    def __reduce__(self) -> tuple[type[Record], tuple[()]]:
        return Record, ()
