# SPDX-License-Identifier: MIT
"""DynamicViT in ViTs: predictors choose what to keep (DynamicViT, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tokred_kernels.flops import linear_flops
from tokred_kernels.methods.schedule import as_text, reducing_blocks, share_per_layer
from tokred_kernels.models import base as models
from tokred_kernels.models.base import Parts
from tokred_kernels.models.patched import Mark
from tokred_kernels.models.rope import moved
from tokred_kernels.models.state import State, Step
from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.nn.dynamicvit import KEEP, TokenPredictor, decide
from tokred_kernels.ops.keep_topk import keep_topk
from tokred_kernels.ops.merge import merge
from tokred_kernels.token_map import TokenMap

# Where the predictors are in the model, as in the published checkpoints.
PREDICTORS = "score_predictor"
# As published, for 12 blocks.
LAYERS = (3, 6, 9)
SHARES = (0.7, 0.49, 0.343)


@dataclass(frozen=True)
class KeepPredicted(Step):
    """What happens before a given block: its predictor decides. When training tokens are masked, else removed."""

    stage: int = 0
    keep: str = "1"  # see `schedule.as_text`
    num_prefix: int = 0
    predictor_flops: int = 0

    def kept(self, patches: int, tokens: int) -> int:
        """How many of `tokens` tokens stay, besides the prefix, where `patches` of them entered the first block."""
        return min(max(int(patches * float(self.keep)), 1), tokens - self.num_prefix)

    def enter(self, model: Any, x: Tensor, state: State) -> tuple[Tensor, State, TokenMap | None]:
        """See `Step`."""
        predictor = getattr(model, PREDICTORS)[self.stage]
        patches = x[:, self.num_prefix :]
        before = state.decisions[-1] if state.decisions else patches.new_ones(patches.shape[:2])
        scores = predictor(patches, before)
        if model.training:
            decision = decide(scores, before)
            policy = F.pad(decision, (self.num_prefix, 0), value=1.0)
            return x, namedtuple_replace(state, policy=policy, decisions=(*state.decisions, decision)), None
        k = self.kept(state.patches, x.shape[1])
        if k == patches.shape[1]:
            return x, state, None
        token_map = keep_topk(F.pad(scores[..., KEEP], (self.num_prefix, 0)), k, num_prefix=self.num_prefix)
        return (
            merge(x, token_map, reduce="sum"),
            namedtuple_replace(state, grid=None, rope=moved(state.rope, token_map)),
            token_map,
        )

    def tokens_attended(self, tokens: int, grid: tuple[int, int]) -> int:
        """See `Step`: when evaluating."""
        return self.num_prefix + self.kept(grid[0] * grid[1], tokens)

    def choice_flops(self, entering: int, attended: int, parts: Parts) -> int:
        """See `Step`: those of the predictor."""
        return (entering - self.num_prefix) * self.predictor_flops


def apply(model: Any, *, layers: Any = LAYERS, keep: Any = SHARES, trace: bool = True) -> None:
    """Let predictors choose the tokens to keep before some blocks: DynamicViT (NeurIPS 2021).

    Args:
        model: the ViT. It gains `model.score_predictor`, a predictor for each given layer with the
            parameter names of published checkpoints; until trained, what they choose is arbitrary.
        layers: indices of blocks, counted from 0 as in `model.blocks[3]` and as published, ascending. Tokens go before
            the block.
        keep: the share of all patches that is kept from each given layer on; a list, not rising, or one for all.
        trace: True (default) keeps the maps of the last forward, for `model.token_map`.

    When training, each predictor draws a policy by Gumbel-softmax, and attention passes over the tokens that it drops:
    all tokens stay, so that gradients reach the predictor. Losses: `nn.ratio_loss(model.token_decisions, keep)`, and
    `nn.distillation_loss`. When evaluating, tokens are removed: those of lowest score, so many that the share is met.

    To train: the gradient that a policy gets is huge where a dropped token outscores all that are kept, so bound it
    (`nn.utils.clip_grad_norm_`). As published, `model.score_predictor` learns alone for a sixth of the epochs, and the
    rest at a lower rate from then on.

    Raises as `patch` says.
    """
    models.check_switches(trace=trace)
    anatomy = models.examine(model)
    if not anatomy.heeds_policy:
        raise NotImplementedError(
            f"tokred_kernels.patch: the model pools its tokens by {anatomy.pool}, which cannot pass over those that "
            "are masked when training; supported are means over tokens, the class token, and none at all"
        )
    given = reducing_blocks(layers, len(anatomy.blocks), LAYERS)
    shares = share_per_layer("keep", keep, len(given), SHARES)
    if any(after > before for before, after in pairwise(shares)):
        raise ValueError(f"tokred_kernels.patch: keep must not rise from layer to layer, got {tuple(shares)}")
    parameter = next(anatomy.model.parameters())
    predictors = nn.ModuleList([TokenPredictor(anatomy.width) for _ in given]).to(parameter.device, parameter.dtype)
    predictors.train(model.training)
    setattr(anatomy.model, PREDICTORS, predictors)
    cost = linear_flops(predictors[0])
    steps = {
        layer: KeepPredicted(False, stage, as_text(share), anatomy.num_prefix, cost)
        for stage, (layer, share) in enumerate(zip(given, shares, strict=True))
    }
    settings = {"layers": given, "keep": keep, "trace": trace}
    mark = Mark("dynamicvit", settings, (PREDICTORS,))
    models.install(model, mark, lambda index: steps.get(index, Step()))
