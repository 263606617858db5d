# SPDX-License-Identifier: MIT
"""EViT: keep the tokens that the class token attends to, and fuse the others into one."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from tokred_kernels.checks import check_choice
from tokred_kernels.methods.method import Method, ascending_layers, check_layers_exist, check_shares, share_texts
from tokred_kernels.models.base import inspect_model, install, model_spec
from tokred_kernels.models.patched import PatchInfo
from tokred_kernels.models.reducer import BlockReducer
from tokred_kernels.models.rope import merge_rope
from tokred_kernels.models.spec import PATCH_INFO, REDUCER
from tokred_kernels.models.state import TokenState
from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.nn.evit import keep_attentive
from tokred_kernels.token_map import TokenMap


@dataclass(frozen=True)
class EViT(Method):
    """EViT (Liang et al., ICLR 2022): in some blocks, keep the most attended tokens and fuse the others into one.

    Selection runs between attention and MLP (paper, section 3). It is the same in training and evaluation, so a patched
    model can be trained or fine-tuned directly. Sizes are not tracked, as published: a fused token has size 1.

    Args:
        keep_rate: the share of its tokens that each layer in `layers` keeps, rounded up, without prefix tokens; above
            0 and at most 1, default 0.7. One number for all layers, or a list with one per layer. `set_keep_rate`
            changes it during training, for example along `nn.cosine_keep_rate`.
        layers: indices of blocks, ascending and counted from 0, as published. Default (3, 6, 9), as published for 12
            blocks.
        fuse: True (default) fuses the other tokens into one, their sum weighted by importance (paper, equation 3).
            False drops them.
        importance: "class" (default) ranks tokens by the attention of the class token; "mean" by the mean attention of
            all tokens, for models without a class token.
        trace: True (default) keeps the maps of the last forward, for `model.token_map`.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: a number is out of range, `layers` does not ascend, or the numbers of rates and layers differ.
    """

    name: ClassVar[str] = "evit"

    keep_rate: float | tuple[float, ...] = 0.7
    layers: tuple[int, ...] = (3, 6, 9)
    fuse: bool = True
    importance: str = "class"
    trace: bool = True

    def __post_init__(self) -> None:
        self.check_flags("fuse", "trace")
        check_choice(self.owner, "importance", self.importance, ("class", "mean"))
        layers = ascending_layers(self.owner, self.layers)
        self.store(layers=layers, keep_rate=check_shares(self.owner, "keep_rate", self.keep_rate, len(layers)))

    def apply(self, module: nn.Module, reusable: Collection[str] = ()) -> None:
        """See `Method`."""
        spec = inspect_model(module)
        if self.importance == "class" and not spec.has_class_token:
            raise ValueError(
                'tokred_kernels.patch: importance must be "mean" for a model without a class token, got "class"'
            )
        check_layers_exist(self, len(spec.blocks))
        reducers = {
            layer: EViTReducer(False, keep, self.fuse, self.importance, spec.num_prefix)
            for layer, keep in zip(self.layers, share_texts(self.keep_rate, len(self.layers)), strict=True)
        }
        install(module, PatchInfo(self), lambda index: reducers.get(index, BlockReducer()))


@dataclass(frozen=True)
class EViTReducer(BlockReducer):
    """Keep the share `keep` of the tokens, by their importance."""

    keep: str = "1"  # see `share_texts`
    fuse: bool = True
    importance: str = "class"
    num_prefix: int = 0

    def needed_importance(self, tokens: int) -> str | None:
        """See `BlockReducer`."""
        return self.importance if self.num_kept(tokens) < tokens - self.num_prefix else None

    def num_kept(self, tokens: int) -> int:
        """Return how many of `tokens` tokens are kept, without the prefix."""
        return math.ceil(float(self.keep) * (tokens - self.num_prefix))

    def reduce(
        self, block: Any, x: Tensor, keys: Tensor, importance: Tensor | None, state: TokenState
    ) -> tuple[Tensor, TokenState, TokenMap | None]:
        """See `BlockReducer`."""
        if importance is None:
            return x, state, None
        k = self.num_kept(x.shape[1])
        x, token_map = keep_attentive(x, importance, k, num_prefix=self.num_prefix, fuse=self.fuse)
        return x, namedtuple_replace(state, grid=None, rope=merge_rope(state.rope, token_map)), token_map

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int:
        """See `BlockReducer`."""
        left = self.num_prefix + self.num_kept(tokens)
        return left + int(self.fuse and left < tokens)


def set_keep_rate(model: nn.Module, keep_rate: Any) -> None:
    """Change the keep rate of a model that is patched with EViT, for example during training.

    `nn.cosine_keep_rate` is the published schedule. A compiled model compiles again for each new number of tokens.

    Args:
        model: the patched model, not a wrapper around it.
        keep_rate: one share for all layers, or a list with one per layer, as for `EViT`.

    Raises:
        TypeError, ValueError: a wrong rate, or a model that is not patched with EViT.
    """
    info = getattr(model, PATCH_INFO, None)
    method = getattr(info, "method", None)
    if not isinstance(info, PatchInfo) or not isinstance(method, EViT):
        raise ValueError(
            f'tokred_kernels.set_keep_rate: model must be patched with "{EViT.name}", got {type(model).__name__}'
            + ("" if info is None else f" patched with {info}")
        )
    method = replace(method, keep_rate=keep_rate)
    spec = model_spec(model)
    if method.layers[-1] >= len(spec.blocks):
        raise ValueError(
            f"tokred_kernels.set_keep_rate: model must have the blocks {method.layers} that were patched, got only "
            f"{len(spec.blocks)} blocks; call tokred_kernels.unpatch(model), and patch it again"
        )
    for layer, keep in zip(method.layers, share_texts(method.keep_rate, len(method.layers)), strict=True):
        block = spec.blocks[layer]
        setattr(block, REDUCER, replace(getattr(block, REDUCER), keep=keep))
    setattr(spec.model, PATCH_INFO, info._replace(method=method))
