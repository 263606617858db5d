# SPDX-License-Identifier: MIT
"""Putting token reduction into the models people already use, and taking it out again."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, TypeVar

from torch import nn

from tokred_kernels import backends
from tokred_kernels.checks import shown

# The module that puts each method in, imported at first use. It has a function `apply(model, **settings)`, which checks
# the settings and the model (by `models.py`, or an adapter of its own), and hands it what each block shall do. Where a
# method takes more than modules, its `resolve(model)` gives the module that is patched, and that carries the mark.
# Where it builds another model instead, `apply` returns that.
METHODS = {
    "tome": "tokred_kernels.patch.tome",
    "algm": "tokred_kernels.patch.algm",
    "dynamicvit": "tokred_kernels.patch.dynamicvit",
    "evit": "tokred_kernels.patch.evit",
    "diffrate": "tokred_kernels.patch.diffrate",
    "tomesd": "tokred_kernels.patch.tomesd",
    "lookupvit": "tokred_kernels.patch.lookupvit",
}

# The attribute that every patched module carries: what was put in, as text, and how to take it out, `remove(module)`.
MARK = "tokred_patch"
# Where a diffusers pipeline keeps the module that is patched.
INSIDE = ("unet", "transformer")

Model = TypeVar("Model")


def patch(model: Model, method: str, **settings: Any) -> Model:
    """Make `model` reduce its tokens as it goes; its parameters and buffers stay what they are.

    Args:
        model: of timm a VisionTransformer (ViT, DeiT with or without the distillation token, with any number of
            register tokens, with or without a class token), or an Eva (EVA-02, DINOv3, Perception Encoder: ViTs with
            rotary positions, of which a merged token has the mean of its members', see
            tokred_kernels.patch.positions). Of transformers the encoder of ViT, DeiT, DINOv2 with or without registers,
            DINOv3, CLIP, MetaCLIP 2, SigLIP, I-JEPA or ViT-MSN, or its image classifier or two-tower model, whose
            encoder is patched; inside of another model give the encoder, if what is around it takes any number of
            tokens. For "tomesd" a diffusers pipeline, UNet or transformer. Patch it before torch.compile, DDP or the
            like wrap it.
        method: how tokens get fewer, and brings its own settings. The `apply` of each method's module describes them
            in full: `from tokred_kernels.patch.algm import apply; help(apply)`.

            "tome", ToMe (tokred_kernels.patch.tome): in each block the most similar tokens merge, by their keys.
                r: how many tokens each block removes: an int, a list, or `(r, inflect)`. Needed.
                prop_attn: True, keys count as often as the tokens they stand for.
                trace: True, keeps the maps of the last forward.
            "algm", ALGM (tokred_kernels.patch.algm): windows merge in an early block, pairs in later ones, where alike.
                layers, window: (1, 5), the blocks that merge, counted from 1; (2, 2), patches of a window.
                threshold, global_threshold: 0.88, None: how alike windows, and pairs, must be.
                count, uneven, group: "batch", "keep", None: whether images differ in how many merge; grids that the
                    window does not divide; processes that shall agree.
                prop_attn, trace: False, True, as for "tome".
            "dynamicvit", DynamicViT (tokred_kernels.patch.dynamicvit): trained predictors choose what is kept, from
            some blocks on; they are new modules of the model.
                layers, keep: (3, 6, 9), (0.7, 0.49, 0.343), the blocks, counted from 0, and the share of all patches.
                trace: True, as for "tome".
            "evit", EViT (tokred_kernels.patch.evit): the class token's attention chooses; the others become one.
                keep_rate, layers: 0.7, (3, 6, 9), the share of the tokens at hand, and the blocks, counted from 0.
                fuse, importance, trace: True, "class", True.
            "diffrate", DiffRate (tokred_kernels.patch.diffrate): the class token's attention sorts; the last are
            pruned, and those before them merge into the others.
                kept: None, the counts of each block: a JSON file or a dict with "prune_kept_num" and "merge_kept_num";
                    None learns them (`diffrate_search`), by new modules of the model.
                granularity: 1, the gap between the counts that may be learned.
                frozen: (0,), the blocks that keep all tokens while counts are learned; (0, -1) for MAE as published.
                prop_attn, trace: True, True, as for "tome".
            "tomesd", ToMe for diffusion (tokred_kernels.patch.tomesd): tokens merge before the chosen parts of each
                transformer block, and come back after.
                ratio, stride, max_downsample: 0.5, (2, 2), 1: how many tokens merge, into those of which cells, and how
                    coarse a grid may be.
                merge_attn, merge_crossattn, merge_mlp: True, False, False, the parts.
                random, generator: True, None: whether the destination of a cell is drawn, and from which generator.
                    None: the timestep decides, so the seed of a pipeline decides its picture.
            "lookupvit", LookupViT (tokred_kernels.patch.lookupvit): changes no model, but builds a LookupViT of its
            weights where these correspond, for fine-tuning.
                grid, grids: of compressed tokens; and those to draw from when training, None.
                lookup_ratio, scatter_proj, drop_path_rate, proj_drop, attn_drop: of `nn.LookupViT`.
        **settings: of the method.

    Returns:
        The same model, or, of "lookupvit", the new one. A model of timm or transformers gains `model.token_map`, from
        the tokens that entered the first block (prefix tokens included; after patch dropout, where that is trained
        with) to the final ones, and `model.token_sizes`, (B, N', 1) float32, how many of those each final token stands
        for; both are of the last forward. For a dense grid: `unmerge(model.forward_features(images), model.token_map)`,
        or, in transformers, `unmerge(encoder(images).last_hidden_state, encoder.token_map)`. A mean over tokens, or an
        attention pool, before the head weighs tokens by their size. Hooks on blocks of timm see tuples
        `(x, state, token_map)`, where `state` has the `size`, `grid` and `packing` of x, and `token_map` is that of the
        block's merge, or None; those on layers of transformers see `(x, state, maps, tokens attended)`, and
        `output_hidden_states` gives x. What a method adds to train (predictors, counts) is in the state dict, and comes
        back by `load_state_dict` into a model that is patched alike; `from_pretrained` does not know of it.

    Raises:
        TypeError: `model` is nothing that can be patched, or a setting is unknown or of a wrong type.
        ValueError: an unknown method, a wrong setting, or a model that is patched already.
        NotImplementedError: a model, block or attention that the method's adapters do not know.
        ImportError: timm, transformers or diffusers is too old, or not installed.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"tokred_kernels.patch: method must be one of {', '.join(map(repr, METHODS))}, got {shown(method)}"
        )
    module = importlib.import_module(METHODS[method])
    target = module.resolve(model) if hasattr(module, "resolve") else model
    if not isinstance(target, nn.Module):
        raise TypeError(f"tokred_kernels.patch: model must be a torch.nn.Module, got {type(target).__name__}")
    before = getattr(target, MARK, None)
    if before is not None:
        raise ValueError(
            f"tokred_kernels.patch: the model is already patched ({before}); "
            "call tokred_kernels.unpatch(model) first, then patch it anew"
        )
    _, *known = inspect.signature(module.apply).parameters.values()
    names = [setting.name for setting in known]
    for name in settings:
        if name not in names:
            raise TypeError(
                f'tokred_kernels.patch: a setting of "{method}" must be one of {", ".join(names)}, got {name}'
            )
    for setting in known:
        if setting.default is setting.empty and setting.name not in settings:
            raise TypeError(
                f'tokred_kernels.patch: "{method}" needs the setting {setting.name}: '
                f'patch(model, "{method}", {setting.name}=...)'
            )
    backends.prepare(target)
    built = module.apply(target, **settings)
    return model if built is None else built


def set_keep_rate(model: nn.Module, keep_rate: Any) -> None:
    """Change the keep rate of a model patched with "evit", as training goes on; see `nn.cosine_keep_rate`.

    Args:
        model: what was patched, not a wrapper around it. A compiled one compiles anew for each number of tokens.
        keep_rate: as in `patch`: one share for all layers, or a list with one for each.

    Raises:
        TypeError, ValueError: a wrong rate, or a model that is not patched with "evit".
    """
    importlib.import_module(METHODS["evit"]).set_keep_rate(model, keep_rate)


def unpatch(model: Model) -> Model:
    """Take out what `patch` put in: the model computes what it did before, to the bit.

    Args:
        model: what was patched, or a pipeline whose `unet` or `transformer` was.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no nn.Module, nor has one inside.
        ValueError: `model` is not patched.
    """
    inside = (model, *(getattr(model, name, None) for name in INSIDE))
    modules = [module for module in inside if isinstance(module, nn.Module)]
    if not modules:
        raise TypeError(f"tokred_kernels.unpatch: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in modules:
        mark = getattr(module, MARK, None)
        if mark is not None:
            mark.remove(module)
            return model
    parts = (part for module in modules for part in module.modules())
    patched = next((type(part).__name__ for part in parts if MARK in vars(part)), None)
    raise ValueError(
        f"tokred_kernels.unpatch: this {type(model).__name__} is not patched"
        + ("" if patched is None else f", but the {patched} inside is: give that")
    )
