# SPDX-License-Identifier: MIT
"""ToMe: merge the most similar tokens in every block."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

from torch import Tensor, nn

from tokred_kernels.checks import check_count, shown
from tokred_kernels.methods.method import Method
from tokred_kernels.models.base import inspect_model, install
from tokred_kernels.models.patched import PatchInfo
from tokred_kernels.models.reducer import BlockReducer
from tokred_kernels.models.spec import BlockSpec
from tokred_kernels.models.state import TokenState
from tokred_kernels.ops.bipartite_match import bipartite_match
from tokred_kernels.token_map import TokenMap

ACCEPTED = "an int, a list with one int per block, or a pair (r, inflect) of an int and a number from -1 to 1"


@dataclass(frozen=True)
class ToMe(Method):
    """Token Merging (Bolya et al., ICLR 2023): in every block, merge the `r` most similar pairs of tokens.

    Similarity is that of the keys. Merging runs between attention and MLP (paper, section 3). Prefix tokens (class,
    distillation and register tokens) never merge.

    Args:
        r: how many tokens each block removes, at most half of the unprotected tokens (more is cut to that). An int
            applies to every block. A list has one int per block. A pair `(r, inflect)` is short for these two settings.
        inflect: how `r` changes over the blocks, from -1 to 1, default 0 (paper, section 4.1): linearly from
            r (1 - inflect) in the first block to r (1 + inflect) in the last one, with the same total. -1 falls from
            2 r to 0, and 1 rises from 0 to 2 r.
        prop_attn: True (default) weighs each key by the number of tokens that it represents (proportional attention,
            paper, section 3). Use it for models trained without merging, and False for MAE pretraining and for models
            trained with merging.
        trace: True (default) keeps the maps of the last forward, for `model.token_map`.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: a negative number, an `inflect` outside [-1, 1], or an `inflect` with a list.
    """

    name: ClassVar[str] = "tome"

    r: int | list[int] | tuple[int, float]
    inflect: float = 0.0
    prop_attn: bool = True
    trace: bool = True

    def __post_init__(self) -> None:
        self.check_flags("prop_attn", "trace")
        where = f"tokred_kernels.{self.owner}"
        r: Any = self.r
        inflect: Any = self.inflect
        if isinstance(r, tuple):
            if len(r) != 2:
                raise ValueError(f"{where}: r must be {ACCEPTED}, got a tuple of {len(r)}; lists go in []")
            if inflect != 0:
                raise ValueError(f"{where}: inflect must be given once, got r={r} and inflect={inflect}")
            r, inflect = self._count("r[0]", r[0]), r[1]
        elif isinstance(r, list):
            r = [self._count(f"r[{index}]", value) for index, value in enumerate(r)]
        else:
            r = self._count("r", r)
        if isinstance(inflect, bool) or not isinstance(inflect, (int, float)):
            raise TypeError(f"{where}: inflect must be a number from -1 to 1, got {inflect!r}")
        if not -1 <= inflect <= 1:
            raise ValueError(f"{where}: inflect must be from -1 to 1, got {inflect}")
        if isinstance(r, list) and inflect != 0:
            raise ValueError(f"{where}: inflect must be 0 if r is a list, got {inflect}")
        self.store(r=r, inflect=inflect)

    def _count(self, name: str, value: Any) -> int:
        where = f"tokred_kernels.{self.owner}"
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(
                f"{where}: r must be {ACCEPTED}, got {name} of type {type(value).__name__} ({shown(value)})"
            )
        if value < 0:
            raise ValueError(f"{where}: r must not be negative, got {name} = {shown(value)}")
        return check_count(self.owner, "r", value)

    def removed_per_block(self, num_blocks: int) -> list[int]:
        """Return how many tokens each of `num_blocks` blocks removes, before the cut to half of the tokens.

        Raises:
            ValueError: `r` is a list of another length. (The authors' code pads a shorter list with zeros.)
        """
        if isinstance(self.r, list):
            if len(self.r) != num_blocks:
                raise ValueError(
                    f"tokred_kernels.patch: r must have one entry for each of the model's {num_blocks} blocks, got "
                    f"{len(self.r)}; give 0 for a block that removes nothing"
                )
            return self.r
        r: Any = self.r
        first = int(r * (1.0 - self.inflect))
        step = (2 * r - 2 * first) / max(num_blocks - 1, 1)
        return [int(first + step * index) for index in range(num_blocks)]

    def apply(self, module: nn.Module, reusable: Collection[str] = ()) -> None:
        """See `Method`."""
        spec = inspect_model(module)
        removed = self.removed_per_block(len(spec.blocks))
        install(module, PatchInfo(self), lambda index: ToMeReducer(self.prop_attn, removed[index], spec.num_prefix))


@dataclass(frozen=True)
class ToMeReducer(BlockReducer):
    """Merge the `r` most similar tokens by their keys; the first `num_prefix` tokens are protected."""

    r: int = 0
    num_prefix: int = 0

    def num_merged(self, tokens: int) -> int:
        """Return how many of `tokens` tokens merge: at most half of the unprotected ones."""
        return min(self.r, max(tokens - self.num_prefix, 0) // 2)

    def match(self, x: Tensor, keys: Tensor, state: TokenState) -> TokenMap | None:
        """See `BlockReducer`."""
        if self.num_merged(x.shape[1]) == 0:
            return None
        return bipartite_match(keys, self.r, num_prefix=self.num_prefix)

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int:
        """See `BlockReducer`."""
        return tokens - self.num_merged(tokens)

    def selection_flops(self, entering: int, attended: int, spec: BlockSpec) -> int:
        """See `BlockReducer`: the matrix product of sources and destinations."""
        if self.num_merged(attended) == 0:
            return 0
        return 2 * (attended - attended // 2) * (attended // 2) * spec.head_dim
