# SPDX-License-Identifier: MIT
"""EViT in ViTs: inattentive tokens are fused into one, or dropped (EViT, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.nn.evit import keep_attentive
from tokred_kernels.patch import MARK, models
from tokred_kernels.patch.patched import STEP, Mark
from tokred_kernels.patch.positions import moved
from tokred_kernels.patch.schedule import as_text, reducing_blocks, share_per_layer
from tokred_kernels.patch.state import State, Step
from tokred_kernels.token_map import TokenMap

METHOD = "evit"
LAYERS = (3, 6, 9)  # as published, for 12 blocks


@dataclass(frozen=True)
class KeepAttentive(Step):
    """What a given block does: keep a share of the tokens, those most attended by the class token, or by all."""

    keep: str = "1"  # see `schedule.as_text`
    fuse: bool = True
    attended_by: str = "class"
    num_prefix: int = 0

    def importance(self, tokens: int) -> str | None:
        """See `Step`."""
        return self.attended_by if self.kept(tokens) < tokens - self.num_prefix else None

    def kept(self, tokens: int) -> int:
        """How many of `tokens` tokens stay, besides the prefix."""
        return math.ceil(float(self.keep) * (tokens - self.num_prefix))

    def reduce(
        self, block: Any, x: Tensor, keys: Tensor, importance: Tensor | None, state: State
    ) -> tuple[Tensor, State, TokenMap | None]:
        """See `Step`."""
        if importance is None:
            return x, state, None
        k = self.kept(x.shape[1])
        x, token_map = keep_attentive(x, importance, k, num_prefix=self.num_prefix, fuse=self.fuse)
        return x, namedtuple_replace(state, grid=None, rope=moved(state.rope, token_map)), token_map

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int:
        """See `Step`."""
        left = self.num_prefix + self.kept(tokens)
        return left + int(self.fuse and left < tokens)


def apply(
    model: Any,
    *,
    keep_rate: Any = 0.7,
    layers: Any = LAYERS,
    fuse: bool = True,
    importance: str = "class",
    trace: bool = True,
) -> None:
    """Keep the tokens that the class token attends to, and fuse the others into one: EViT (ICLR 2022).

    Args:
        model: the ViT.
        keep_rate: the share of the tokens at hand that each given layer keeps, rounded up, prefix tokens not counted;
            above 0, at most 1. One for all, or a list with one for each. `set_keep_rate` changes it, for a schedule.
        layers: indices of blocks, counted from 0 as in `model.blocks[3]` and as published, ascending. They reduce
            between attention and MLP.
        fuse: True (default): the others become one token, their sum weighted by importance. False drops them.
        importance: "class" (default), what the class token attends to; "mean", what all tokens do, for models without.
        trace: True (default) keeps the maps of the last forward, for `model.token_map`.

    The model is the same when training, so it is trained, or fine-tuned, as it is. Sizes are not tracked, as published:
    a fused token counts as one.

    Raises as `patch` says.
    """
    models.check_switches(fuse=fuse, trace=trace)
    if not isinstance(importance, str) or importance not in ("class", "mean"):
        raise ValueError(f'tokred_kernels.patch: importance must be "class" or "mean", got {importance!r}')
    anatomy = models.examine(model)
    if importance == "class" and not anatomy.class_token:
        raise ValueError(
            'tokred_kernels.patch: importance must be "mean" for a model without a class token, got "class"'
        )
    given = reducing_blocks(layers, len(anatomy.blocks), LAYERS)
    rates = share_per_layer("keep_rate", keep_rate, len(given))
    prefix = anatomy.num_prefix
    steps = {
        layer: KeepAttentive(False, as_text(rate), fuse, importance, prefix)
        for layer, rate in zip(given, rates, strict=True)
    }
    settings = {"keep_rate": keep_rate, "layers": given, "fuse": fuse, "importance": importance, "trace": trace}
    models.install(model, Mark(METHOD, settings), lambda index: steps.get(index, Step()))


def set_keep_rate(model: Any, keep_rate: Any) -> None:
    """See `tokred_kernels.set_keep_rate`."""
    mark = getattr(model, MARK, None)
    if not isinstance(mark, Mark) or mark.method != METHOD:
        raise ValueError(
            f'tokred_kernels.set_keep_rate: model must be patched with "{METHOD}", got {type(model).__name__}'
            + ("" if mark is None else f" patched with {mark}")
        )
    given = mark.settings["layers"]
    anatomy = models.anatomy(model)
    blocks = anatomy.blocks
    if given[-1] >= len(blocks):
        raise ValueError(
            f"tokred_kernels.set_keep_rate: model must still have the blocks {given} that it was patched in, got "
            f"{len(blocks)} blocks; call tokred_kernels.unpatch(model), and patch those that are left"
        )
    rates = share_per_layer("keep_rate", keep_rate, len(given))
    for layer, rate in zip(given, rates, strict=True):
        setattr(blocks[layer], STEP, replace(blocks[layer].tokred_step, keep=as_text(rate)))
    setattr(anatomy.model, MARK, mark._replace(settings={**mark.settings, "keep_rate": keep_rate}))
