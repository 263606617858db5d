# SPDX-License-Identifier: MIT
"""Which models can be patched, and what the methods must know of them: the one door to the libraries' adapters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tokred_kernels.models.patched import Mark
from tokred_kernels.models.state import Step
from tokred_kernels.patching import MARK

# The models that are known, by the package that their classes are of. Of each, the module <package>_models.py beside
# this one has `supports(model)`, `check(model)`, `anatomy(model)` and `install(model, mark, steps)`, as here, and
# <package>_flops.py what `flops.py` asks for.
SUPPORTED = {
    "timm": (
        "timm's VisionTransformer and VisionTransformerDistilled, made of timm's Block and Attention, and Eva (EVA, "
        "DINOv3, Perception Encoder), made of EvaBlock"
    ),
    "transformers": (
        "transformers' ViT, DeiT, DINOv2 (with registers or without), DINOv3 ViT, CLIP, MetaCLIP 2, SigLIP, I-JEPA and "
        "ViT-MSN, alone or as its image classifiers and its two-tower models have them"
    ),
}
OWN_BLOCK = "write a block of your own with tokred_kernels.bipartite_match and merge_wavg"


class Parts(NamedTuple):
    """Of a block: its attention and MLP, its channels C, those of all heads together, and of one."""

    attention: Any
    mlp: Any
    width: int
    inner: int
    head_width: int


class ModelSpec(NamedTuple):
    """What the methods must know of a model.

    Attributes:
        model: the module that runs the blocks, and that carries what a method adds.
        blocks: of transformer, in order.
        parts: of each block.
        patches: how many an image has, as the model was made; None where the patch embedding does not tell.
        num_prefix: how many tokens come before the patches.
        class_token: whether the first of them is a class token.
        width: C.
        grid: of the patches, down and across, as the model was made; None where images may be of any size.
        gridless: None, or the name of the patch embedding that does not tell its grid.
        packs: whether the model goes on with packed tokens (T, C).
        pool: how it makes one vector of its tokens.
        heeds_policy: whether that passes over tokens that are masked.
    """

    model: Any
    blocks: Sequence[Any]
    parts: tuple[Parts, ...]
    patches: int | None
    num_prefix: int
    class_token: bool
    width: int
    grid: tuple[int, int] | None
    gridless: str | None
    packs: bool
    pool: str
    heeds_policy: bool


def examine(model: Any) -> ModelSpec:
    """What `model` is made of; raise NotImplementedError unless it and all its parts are what an adapter knows.

    Exact classes, not derived ones: what a subclass overrides, a patch would overrule in silence.
    """
    adapter = _adapter(model)
    if adapter is None or not adapter.supports(model):
        patched = next((part for part in model.modules() if MARK in vars(part)), None)
        if patched is not None:
            raise ValueError(
                f"tokred_kernels.patch: the {type(patched).__name__} inside this {type(model).__name__} is already "
                f"patched ({getattr(patched, MARK)})"
            )
        wrapped = next((part for part in model.modules() if _supports(part)), None)
        advice = (
            OWN_BLOCK if wrapped is None else f"give the {type(wrapped).__name__} inside it, before anything wraps it"
        )
        raise NotImplementedError(
            f"tokred_kernels.patch: {type(model).__module__}.{type(model).__name__} is not supported; "
            f"{'; and '.join(SUPPORTED.values())} are. You can {advice}"
        )
    adapter.check(model)
    return adapter.anatomy(model)


def anatomy(model: Any) -> ModelSpec:
    """The same of a model that is known to be one, patched or not."""
    return _adapter(model).anatomy(model)


def install(model: Any, mark: Mark, steps: Callable[[int], Step]) -> None:
    """Patch `model`, which `examine` has passed: the block of each index does `steps(index)`."""
    _adapter(model).install(model, mark, steps)


def check_switches(**switches: Any) -> None:
    """Raise TypeError unless each setting is True or False."""
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"tokred_kernels.patch: {name} must be True or False, got {value!r}")


def library(model: Any) -> str | None:
    """The package that the model's class, or one that it derives from, is of; None for one that is not known."""
    roots = (kind.__module__.partition(".")[0] for kind in type(model).__mro__)
    return next((root for root in roots if root in SUPPORTED), None)


def _adapter(model: Any) -> Any:
    name = library(model)
    return None if name is None else importlib.import_module(f"tokred_kernels.models.{name}.adapter")


def _supports(model: Any) -> bool:
    adapter = _adapter(model)
    return adapter is not None and adapter.supports(model)
