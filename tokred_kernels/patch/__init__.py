# SPDX-License-Identifier: MIT
"""Putting token reduction into the models people already use, and taking it out again."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

# The module that puts each method in, imported at first use. It has one function, `apply(model, **settings)`, which
# checks the settings and the model, and hands over to the adapters of the model families (`timm_vit.py`, ...).
METHODS = {"tome": "tokred_kernels.patch.tome"}

# The attribute that every patched model carries: what was put in, and how to take it out.
MARK = "tokred_patch"


def patch(model: nn.Module, method: str, **settings: Any) -> nn.Module:
    """Make `model` reduce its tokens as it goes; its parameters, buffers and state dict stay what they are.

    Args:
        model: a timm VisionTransformer (ViT, DeiT with or without the distillation token, with any number of register
            tokens, with or without a class token). Patch it before torch.compile, DDP or the like wrap it.
        method: "tome", token merging (ToMe): between attention and MLP of each block the most similar tokens merge.
        **settings: of the method. For "tome":
            r: how many tokens each block removes (at most half of the unprotected ones: more is cut to that). An int
                for every block; a list with one number a block, short lists ending in zeros; or `(r, inflect)`, a
                number that changes linearly over the blocks with the same sum: inflect -1 falls from 2 r to 0, +1
                rises from 0 to 2 r, 0 is constant, as in ToMe.
            prop_attn: True (default) lets keys count as often as the tokens they stand for. For models trained
                without merging. False for MAE pretraining, and for models trained with merging.
            trace: True (default) keeps the maps of the last forward, for `model.token_map`.

    Returns:
        The same model. It gains `model.token_map`, from the tokens that entered the first block (prefix tokens
        included; after patch dropout, where that is trained with) to the final ones, and `model.token_sizes`,
        (B, N', 1) float32, how many of those each final token stands for; both are of the last forward. A mean over
        tokens, or an attention pool, before the head weighs tokens by their size. Hooks on blocks see tuples
        `(x, size, token_map)`.

    Raises:
        TypeError: `model` is no nn.Module, or a setting is of a wrong type.
        ValueError: an unknown method, a wrong setting, or a model that is patched already.
        NotImplementedError: a model, block or attention that the method's adapters do not know.
        ImportError: timm is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tokred_kernels.patch: model must be a torch.nn.Module, got {type(model).__name__}")
    if method not in METHODS:
        raise ValueError(f"tokred_kernels.patch: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    before = getattr(model, MARK, None)
    if before is not None:
        raise ValueError(
            f"tokred_kernels.patch: the model is already patched ({before}); "
            "call tokred_kernels.unpatch(model) first, then patch it anew"
        )
    importlib.import_module(METHODS[method]).apply(model, **settings)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Take out what `patch` put in: the model computes what it did before, to the bit.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: `model` is not patched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tokred_kernels.unpatch: model must be a torch.nn.Module, got {type(model).__name__}")
    mark = getattr(model, MARK, None)
    if mark is None:
        raise ValueError(f"tokred_kernels.unpatch: this {type(model).__name__} is not patched")
    mark.remove(model)
    return model
