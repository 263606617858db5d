# SPDX-License-Identifier: MIT
"""Tiny models patched with EViT and DynamicViT, and the papers written out."""

import importlib.util
from pathlib import Path

from algm_models import make
from torch import nn

from tokred_kernels.patch import patch

spec = importlib.util.spec_from_file_location("dense_pruning", Path(__file__).parent / "patch/dense_pruning.py")
dense_pruning = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dense_pruning)

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
    """Patched, its predictors drawn too: as they start they hardly tell tokens apart."""
    model = patch(make(name, **more), "dynamicvit", layers=layers, keep=keep)
    for parameter in model.score_predictor.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model
