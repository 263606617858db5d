# SPDX-License-Identifier: MIT
"""What travels with a patched model's tokens, and what a method does with them in one block."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred_kernels.models.rope import moved
from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.ops.merge_wavg import merge_wavg
from tokred_kernels.packing import Packing
from tokred_kernels.token_map import TokenMap


class State(NamedTuple):
    """What travels with the tokens from block to block.

    Attributes:
        size: (B, N, 1) float32, or (T, 1), how many of the first tokens each token stands for; None for 1 each, and
            where a method does not count.
        grid: height and width of the patches after the prefix, as long as they are a grid: None once tokens have
            merged, or been dropped, and where the patch embedding does not tell.
        packing: where each image starts, once every image has a count of its own and x is (T, C); else None.
        policy: (B, N), 1 for tokens that are kept and 0 for those that attention passes over, where a method masks
            tokens instead of removing them; else None.
        decisions: the policies that a method has drawn so far, without prefix tokens.
        patches: how many tokens after the prefix entered the first block.
        rope: where a model has rotary positions, the sines and cosines of the tokens, those of prefix tokens included:
            (1, N, 2 d) of all images, or, once tokens have merged or been dropped, (B, N, 2 d), or (T, 2 d); of a
            token that stands for several, their mean (see `patch.positions`).
    """

    size: Tensor | None = None
    grid: tuple[int, int] | None = None
    packing: Packing | None = None
    policy: Tensor | None = None
    decisions: tuple[Tensor, ...] = ()
    patches: int = 0
    rope: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What a method does in one block; each block carries one. This one does nothing.

    Attributes:
        proportional: whether keys count as often as the tokens they stand for.
    """

    proportional: bool = False

    def at(self, block: Any) -> Step:
        """The step with what it takes from `block`, where that is not fixed."""
        return self

    def importance(self, tokens: int) -> str | None:
        """The `importance` that is wanted of the block's attention over so many tokens; see `ops.token_attention`."""
        return None

    def enter(self, model: Any, x: Tensor, state: State) -> tuple[Tensor, State, TokenMap | None]:
        """What happens before the block: x (B, N, C), or packed (T, C), its state, and the map that was followed."""
        return x, state, None

    def reduce(
        self, block: Any, x: Tensor, keys: Tensor, importance: Tensor | None, state: State
    ) -> tuple[Tensor, State, TokenMap | None]:
        """What happens between attention and MLP: merging along `match`, sizes tracked.

        Args:
            block: the block.
            x: (B, N, C), or packed (T, C), the tokens after the attention residual.
            keys: (B, H, N, d), or (T, H, d), of that attention.
            importance: (B, N), or (T,), that it gave, or None.
            state: of these tokens.

        Returns:
            Those that leave, their state, and the map that was followed; None where all stay.
        """
        token_map = self.match(x, keys, state)
        if token_map is None:
            return x, state, None
        rope = moved(state.rope, token_map, state.size)
        x, size = merge_wavg(x, token_map, state.size)
        return x, namedtuple_replace(state, size=size, grid=None, packing=token_map.packed, rope=rope), token_map

    def match(self, x: Tensor, keys: Tensor, state: State) -> TokenMap | None:
        """Where the tokens go between attention and MLP; None where all stay."""
        return None

    def tokens_attended(self, tokens: int, grid: tuple[int, int]) -> int | None:
        """How many of an image's `tokens` tokens the block's attention has; None where that depends on the image.

        `grid` is that of the patches when they entered the first block.
        """
        return tokens

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int | None:
        """How many of the `tokens` tokens of its attention leave the block; None where that depends on the image."""
        return tokens

    def choice_flops(self, entering: int, attended: int, parts: Any) -> int:
        """The floating-point operations of choosing, an image, where so many tokens enter and so many attend.

        `parts` are those of the block, `models.Parts`.
        """
        return 0


def whole(size: Any) -> Any:
    """`size`, an entry of a shape, as an int if torch.jit.trace has made a tensor of it."""
    return int(size) if isinstance(size, Tensor) else size


class Record:
    """What the last forward did: its merges, its final state, and how many tokens there were where.

    A class, not a tuple, so that torch.export takes it for no tensor that a forward may not assign. It belongs to a
    forward, not to the model: copies and pickles of the model start without.

    Attributes:
        maps: of each merge; None where they are not kept.
        state: of the final tokens.
        entered: B, N and the device of the tokens that entered the first block.
        counts: of each block, how many tokens its attention had, and how many left it: N', or, of packed tokens, that
            of each image.
    """

    # The tensor that the forward gave, as long as somebody holds it.
    _given: weakref.ref[Tensor] | None = None

    def __init__(
        self,
        maps: tuple[TokenMap, ...] | None = None,
        state: State | None = None,
        entered: tuple[int, int, torch.device] | None = None,
        counts: tuple[tuple[int | tuple[int, ...], int | tuple[int, ...]], ...] = (),
    ) -> None:
        self.maps = maps
        self.state = State() if state is None else state
        self.entered = entered
        self.counts = counts

    def gave(self, x: Tensor) -> bool:
        """Whether `x` is what this forward gave: that very tensor, or, from a compiled forward, one of its shape."""
        if self.entered is None:
            return False
        if self._given is not None:
            return self._given() is x
        rows = (self.entered[0], self.left[-1]) if self.state.packing is None else (self.state.packing.rows,)
        return x.shape[:-1] == rows

    def remember(self, x: Tensor) -> None:
        """Let `x` be what this forward gave. A compiler follows no weak references."""
        if not torch.compiler.is_compiling():
            self._given = weakref.ref(x)

    def token_map(self) -> TokenMap:
        """All maps of the forward as one.

        Raises:
            AttributeError: the model has not run yet, or does not keep its maps. So `hasattr` works, and with it tools
                that read every attribute of a model.
        """
        if self.entered is None:
            raise AttributeError("tokred_kernels: the model has no token_map before its first forward; run it once")
        if self.maps is None:
            raise AttributeError("tokred_kernels: the model was patched with trace=False; patch it with trace=True")
        if not self.maps:
            return TokenMap.identity(*self.entered)
        composed = self.maps[0]
        for token_map in self.maps[1:]:
            composed = composed.then(token_map)
        # One map from now on: asking twice composes once, and the layers' maps are let go.
        self.maps = (composed,)
        return composed

    @property
    def left(self) -> tuple[int | tuple[int, ...], ...]:
        """How many tokens left each block."""
        return tuple(after for _, after in self.counts)

    def __reduce__(self) -> tuple[type[Record], tuple[()]]:
        return Record, ()
