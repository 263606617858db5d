# SPDX-License-Identifier: MIT
"""Tiny models patched with EViT and DynamicViT, counts for DiffRate, and the papers written out."""

from algm_models import make
from torch import nn
from written_out import load_dense

from tokred_kernels.patching import patch

dense_pruning = load_dense("pruning")

LAYERS = (1, 2, 3)
# What DynamicViT keeps, and, of 36 patches, how many that is.
KEEP, LEFT = (0.7, 0.5, 0.25), (25, 18, 9)


def importances(name):
    """What EViT can go by in this model."""
    return ["mean"] if name == "no prefix" else ["class", "mean"]


def make_evit(name="vit", fuse=True, **more):
    """Patched with settings that it can take."""
    return patch(make(name, **more), "evit", layers=LAYERS, fuse=fuse, importance=importances(name)[0])


def make_dynamicvit(name="vit", layers=LAYERS, keep=KEEP, **more):
    """Patched, with random predictors: the initial ones give all tokens almost the same score."""
    model = patch(make(name, **more), "dynamicvit", layers=layers, keep=keep)
    for parameter in model.score_predictor.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def rates(model):
    """Return the learned rates of each block: that of pruning, then that of merging."""
    return [rate for block in model.blocks for rate in (block.prune_ddp, block.merge_ddp)]


def set_counts(model, counts):
    """Set each rate to its count: put all probability on one candidate."""
    for rate, number in zip(rates(model), [n for pair in zip(*counts, strict=True) for n in pair], strict=True):
        nn.init.zeros_(rate.selected_probability)
        rate.selected_probability.data[(rate.kept_token_candidate + rate.prefix >= number).sum() - 1] = 1000.0
