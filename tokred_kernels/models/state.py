# SPDX-License-Identifier: MIT
"""The state of the tokens between blocks, and the trace that a forward leaves in a patched model."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred_kernels.packing import Packing
from tokred_kernels.token_map import TokenMap


class TokenState(NamedTuple):
    """What travels with the tokens from block to block.

    Attributes:
        size: (B, N, 1) or (T, 1) float32, how many input tokens each token represents; None if all sizes are 1, or if
            the method does not track sizes.
        grid: (height, width) of the patches, while they form a grid: None after tokens merged or were dropped, and if
            the patch embedding does not define a grid.
        packing: where each image starts if images have different numbers of tokens and x is (T, C); else None.
        policy: (B, N), 1 for kept tokens and 0 for masked ones, for methods that mask instead of removing; else None.
        decisions: the policies that the method has drawn so far, without prefix tokens.
        patches: the number of patches that entered the first block.
        rope: sines and cosines of all tokens of a model with rotary positions, prefix tokens included: (1, N, 2 d) for
            all images, and after a reduction (B, N, 2 d) or (T, 2 d); see `models.rope`.
    """

    size: Tensor | None = None
    grid: tuple[int, int] | None = None
    packing: Packing | None = None
    policy: Tensor | None = None
    decisions: tuple[Tensor, ...] = ()
    patches: int = 0
    rope: Tensor | None = None


def int_size(size: Any) -> Any:
    """Return an entry of a shape as an int if torch.jit.trace has made it a tensor."""
    return int(size) if isinstance(size, Tensor) else size


def count_tokens(x: Tensor, state: TokenState) -> int | tuple[int, ...]:
    """Return the tokens per image; for packed tokens, a tuple with one number per image."""
    return x.shape[1] if state.packing is None else state.packing.lengths


def pooling_weights(state: TokenState) -> Tensor | None:
    """Return the weight (B, N, 1) of each final token in a mean; None if all weights are 1."""
    if state.policy is None:
        return state.size
    kept = state.policy.unsqueeze(-1)
    return kept if state.size is None else kept * state.size


class ForwardTrace:
    """The token maps, final state and token counts of a model's last forward.

    This is a class and not a tuple because torch.export forbids a forward to assign tensors. A trace belongs to one
    forward: copies and pickles of the model start with an empty one.

    Attributes:
        maps: the map of each reduction, in order; None if they are not kept.
        state: the state of the final tokens.
        entered: (B, N, device) of the tokens that entered the first block; None before the first forward.
        counts: for each block, the tokens in its attention and the tokens that left it; for packed tokens, both are
            tuples with one number per image.
    """

    # The output of the forward, for as long as someone else keeps it alive.
    _output: weakref.ref[Tensor] | None = None

    def __init__(
        self,
        maps: tuple[TokenMap, ...] | None = None,
        state: TokenState | None = None,
        entered: tuple[int, int, torch.device] | None = None,
        counts: tuple[tuple[int | tuple[int, ...], int | tuple[int, ...]], ...] = (),
    ) -> None:
        self.maps = maps
        self.state = TokenState() if state is None else state
        self.entered = entered
        self.counts = counts

    def is_output(self, x: Tensor) -> bool:
        """Return whether `x` is the output of this forward; after a compiled forward, whether it has the same shape."""
        if self.entered is None:
            return False
        if self._output is not None:
            return self._output() is x
        rows = (self.entered[0], self.left[-1]) if self.state.packing is None else (self.state.packing.rows,)
        return x.shape[:-1] == rows

    def set_output(self, x: Tensor) -> None:
        """Remember `x` as the output of this forward, except while compiling: dynamo does not trace weak references."""
        if not torch.compiler.is_compiling():
            self._output = weakref.ref(x)

    def token_map(self) -> TokenMap:
        """Return the composition of all maps of the forward.

        Raises:
            AttributeError: the model has not run yet, or does not keep its maps. This type lets `hasattr` work, and
                tools that read every attribute of a model.
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
        self.maps = (composed,)  # compose once, and free the maps of the blocks
        return composed

    @property
    def left(self) -> tuple[int | tuple[int, ...], ...]:
        """The number of tokens that left each block."""
        return tuple(after for _, after in self.counts)

    def __reduce__(self) -> tuple[type[ForwardTrace], tuple[()]]:
        return ForwardTrace, ()
