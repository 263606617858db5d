# SPDX-License-Identifier: MIT
"""DynamicViT: trained predictors decide which tokens to keep."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from tokred_kernels.methods.method import Method, ascending_layers, check_layers_exist, check_shares, share_texts
from tokred_kernels.models.base import inspect_model, install
from tokred_kernels.models.patched import PatchInfo
from tokred_kernels.models.reducer import BlockReducer
from tokred_kernels.models.rope import merge_rope
from tokred_kernels.models.spec import BlockSpec, ModelSpec
from tokred_kernels.models.state import TokenState
from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.nn.dynamicvit import KEEP, TokenPredictor, decide
from tokred_kernels.nn.flops import linear_flops
from tokred_kernels.ops.keep_topk import keep_topk
from tokred_kernels.ops.merge import merge
from tokred_kernels.token_map import TokenMap

PREDICTORS = "score_predictor"  # the model's attribute for the predictors, as in the published checkpoints


@dataclass(frozen=True)
class DynamicViT(Method):
    """DynamicViT (Rao et al., NeurIPS 2021): before some blocks, predictors decide which tokens to keep.

    The model gets a new module `score_predictor` with one `nn.TokenPredictor` per layer in `layers`, with the parameter
    names of the published checkpoints. Train it first: until then, its choices are arbitrary.

    In training, each predictor draws a policy by Gumbel-softmax (paper, section 3.3), and attention masks the tokens
    that
    it drops: all tokens stay, so that gradients reach the predictors. The losses are
    `nn.ratio_loss(model.token_decisions, keep)` and `nn.distillation_loss` (section 3.4). In evaluation, the tokens
    with the lowest scores are removed.

    The gradient of a policy is very large if a dropped token outscores all kept ones, so clip gradients
    (`nn.utils.clip_grad_norm_`). As published, train only `model.score_predictor` in the first sixth of the epochs, and
    the rest afterwards with a lower learning rate.

    Args:
        layers: indices of blocks, ascending and counted from 0, as published; tokens are removed before the block.
            Default (3, 6, 9), as published for 12 blocks.
        keep: the share of all patches that is kept from each of these layers on, above 0 and at most 1. A list that
            does not rise, with one number per layer, or one number for all. Default (0.7, 0.49, 0.343), as published.
        trace: True (default) keeps the maps of the last forward, for `model.token_map`.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: a number is out of range, `layers` does not ascend, `keep` rises, or their lengths differ.
    """

    name: ClassVar[str] = "dynamicvit"

    layers: tuple[int, ...] = (3, 6, 9)
    keep: float | tuple[float, ...] = (0.7, 0.49, 0.343)
    trace: bool = True

    def __post_init__(self) -> None:
        self.check_flags("trace")
        layers = ascending_layers(self.owner, self.layers)
        keep = check_shares(self.owner, "keep", self.keep, len(layers), type(self).keep)
        if isinstance(keep, tuple) and any(after > before for before, after in pairwise(keep)):
            raise ValueError(f"tokred_kernels.{self.owner}: keep must not rise from layer to layer, got {keep}")
        self.store(layers=layers, keep=keep)

    def apply(self, module: nn.Module, reusable: Collection[str] = ()) -> None:
        """See `Method`; predictors are used again if there are as many as layers."""
        spec = inspect_model(module)
        if not spec.pools_masked:
            raise NotImplementedError(
                f"tokred_kernels.patch: the model pools its tokens by {spec.pool}, which cannot ignore the tokens that "
                "are masked in training; supported are means over tokens, the class token, and no pooling"
            )
        check_layers_exist(self, len(spec.blocks))
        predictors = getattr(spec.model, PREDICTORS) if PREDICTORS in reusable else None
        if predictors is None or len(predictors) != len(self.layers):
            predictors = self._make_predictors(spec).train(module.training)
            setattr(spec.model, PREDICTORS, predictors)
        cost = linear_flops(predictors[0])
        reducers = {
            layer: PredictorReducer(False, stage, keep, spec.num_prefix, cost)
            for stage, (layer, keep) in enumerate(
                zip(self.layers, share_texts(self.keep, len(self.layers)), strict=True)
            )
        }
        install(module, PatchInfo(self, (PREDICTORS,)), lambda index: reducers.get(index, BlockReducer()))

    def _make_predictors(self, spec: ModelSpec) -> nn.ModuleList:
        parameter = next(spec.model.parameters())
        predictors = nn.ModuleList([TokenPredictor(spec.embed_dim) for _ in self.layers])
        return predictors.to(parameter.device, parameter.dtype)


@dataclass(frozen=True)
class PredictorReducer(BlockReducer):
    """Before the block, mask (in training) or remove the tokens that the predictor number `stage` drops."""

    stage: int = 0
    keep: str = "1"  # see `share_texts`
    num_prefix: int = 0
    predictor_flops: int = 0

    def num_kept(self, patches: int, tokens: int) -> int:
        """Return how many of `tokens` tokens are kept, without the prefix, if `patches` entered the first block."""
        return min(max(int(patches * float(self.keep)), 1), tokens - self.num_prefix)

    def before_block(self, model: Any, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState, TokenMap | None]:
        """See `BlockReducer`."""
        predictor = getattr(model, PREDICTORS)[self.stage]
        patches = x[:, self.num_prefix :]
        before = state.decisions[-1] if state.decisions else patches.new_ones(patches.shape[:2])
        scores = predictor(patches, before)
        if model.training:
            decision = decide(scores, before)
            policy = F.pad(decision, (self.num_prefix, 0), value=1.0)
            return x, namedtuple_replace(state, policy=policy, decisions=(*state.decisions, decision)), None
        k = self.num_kept(state.patches, x.shape[1])
        if k == patches.shape[1]:
            return x, state, None
        token_map = keep_topk(F.pad(scores[..., KEEP], (self.num_prefix, 0)), k, num_prefix=self.num_prefix)
        state = namedtuple_replace(state, grid=None, rope=merge_rope(state.rope, token_map))
        return merge(x, token_map, reduce="sum"), state, token_map

    def tokens_attended(self, tokens: int, grid: tuple[int, int]) -> int:
        """See `BlockReducer`; the number in evaluation."""
        return self.num_prefix + self.num_kept(grid[0] * grid[1], tokens)

    def selection_flops(self, entering: int, attended: int, spec: BlockSpec) -> int:
        """See `BlockReducer`: the predictor."""
        return (entering - self.num_prefix) * self.predictor_flops
