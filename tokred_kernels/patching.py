# SPDX-License-Identifier: MIT
"""Add a token reduction method to a model, and remove it again."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from torch import nn

from tokred_kernels import backends
from tokred_kernels.checks import check_flag, shown
from tokred_kernels.methods import ALGM, DiffRate, DynamicViT, EViT, Method, ToMe, ToMeSD
from tokred_kernels.methods.tomesd import DENOISERS
from tokred_kernels.models.patched import PatchInfo
from tokred_kernels.models.spec import PATCH_INFO
from tokred_kernels.nn.lookupvit import LookupViT

METHODS: dict[str, type[Method]] = {method.name: method for method in (ToMe, ALGM, DynamicViT, EViT, DiffRate, ToMeSD)}
LOOKUPVIT = "lookupvit"

Model = TypeVar("Model")


def patch(model: Model, method: str | Method, *, replace: bool = False, **settings: Any) -> Model:
    """Make `model` reduce its tokens; its parameters and buffers stay the same.

    `patch(model, tk.methods.ToMe(r=8))` and `patch(model, "tome", r=8)` are the same call.

    Args:
        model: one of these, before torch.compile, DDP or similar wrap it.

            - timm: a VisionTransformer (ViT, DeiT with or without distillation, any number of register tokens, with or
              without class token), or an Eva (EVA-02, DINOv3, Perception Encoder: ViTs with rotary positions).
            - transformers: the encoder of ViT, DeiT, DINOv2 with or without registers, DINOv3, CLIP, MetaCLIP 2,
              SigLIP, I-JEPA or ViT-MSN, or its image classifier or two-tower model. For an encoder inside another
              model, give the encoder, if the other model can process any number of tokens.
            - diffusers, for ToMeSD: a pipeline, UNet or transformer.
        method: a method of `tokred_kernels.methods` with its settings, or its name: "tome" (ToMe), "algm" (ALGM),
            "dynamicvit" (DynamicViT), "evit" (EViT), "diffrate" (DiffRate) or "tomesd" (ToMeSD). The classes document
            the settings. "lookupvit" is an alias for `nn.LookupViT.from_vit(model, **settings)`.
        replace: True changes the method or the settings of a model that is already patched. Trained modules of the old
            method (predictors, learned counts) are kept if they fit the new settings. After an error, the model is
            unchanged. A model that is not patched is patched.
        **settings: the settings of a method given by its name.

    Returns:
        The same model; for "lookupvit", the new one. A model of timm or transformers gets these properties of its last
        forward: `model.token_map`, from the tokens that entered the first block (prefix tokens included, after patch
        dropout) to the final ones, and `model.token_sizes`, (B, N', 1) float32, how many of them each final token
        represents. `unmerge(model.forward_features(images), model.token_map)` has one token per patch again; in
        transformers, use `encoder(images).last_hidden_state` and `encoder.token_map`. Means over tokens and attention
        pooling before the head weigh tokens by size.

        Hooks on blocks of timm get `(x, state, token_map)`, where `state` has the `size`, `grid` and `packing` of x and
        `token_map` is the map of the block, or None. Hooks on layers of transformers get
        `(x, state, maps, tokens attended)`, and `output_hidden_states` gives x. Trainable modules that a method adds
        are
        in the state dict: `load_state_dict` loads them into a model with the same patch, `from_pretrained` does not.

    Raises:
        TypeError: `model` cannot be patched at all, or a setting is unknown, missing or has a wrong type.
        ValueError: an unknown method, a wrong setting, or a model that is already patched.
        NotImplementedError: a model, block or attention that is not supported.
        ImportError: timm, transformers or diffusers is too old, or not installed.
    """
    check_flag("patch", "replace", replace)
    if isinstance(method, str) and method == LOOKUPVIT:
        return _lookupvit(model, settings)
    if isinstance(method, Method):
        if settings:
            raise TypeError(
                f"tokred_kernels.patch: settings must be given to {type(method).__name__}(...), got "
                f"{', '.join(settings)} in patch"
            )
    else:
        if not isinstance(method, str) or method not in METHODS:
            names = ", ".join(map(repr, (*METHODS, LOOKUPVIT)))
            raise ValueError(
                f"tokred_kernels.patch: method must be a method of tokred_kernels.methods or one of {names}, got "
                f"{shown(method)}"
            )
        kind = METHODS[method]
        known = {field.name: field.default is MISSING for field in fields(kind)}
        _check_settings(method, known, settings)
        method = kind(**settings)
    module = method.patched_module(model)
    if not isinstance(module, nn.Module):
        raise TypeError(f"tokred_kernels.patch: model must be a torch.nn.Module, got {type(module).__name__}")
    info = getattr(module, PATCH_INFO, None)
    if info is not None and not replace:
        raise ValueError(
            f"tokred_kernels.patch: the model is already patched ({info}); call tokred_kernels.unpatch(model) first, "
            "or give replace=True"
        )
    backends.prepare(module)
    if info is None:
        method.apply(module)
    else:
        _replace(module, info, method)
    return model


def _check_settings(method: str, known: dict[str, bool], settings: dict[str, Any]) -> None:
    """Raise TypeError unless all settings are known, and all needed ones are given; `known` maps to "is needed"."""
    for name in settings:
        if name not in known:
            raise TypeError(
                f'tokred_kernels.patch: a setting of "{method}" must be one of {", ".join(known)}, got {name}'
            )
    for name, needed in known.items():
        if needed and name not in settings:
            raise TypeError(
                f'tokred_kernels.patch: "{method}" needs the setting {name}: patch(model, "{method}", {name}=...)'
            )


def _lookupvit(vit: Any, settings: dict[str, Any]) -> Any:
    _, *known = inspect.signature(LookupViT.from_vit).parameters.values()
    _check_settings(LOOKUPVIT, {setting.name: setting.default is setting.empty for setting in known}, settings)
    return LookupViT.from_vit(vit, **settings)


def _replace(module: nn.Module, info: PatchInfo, method: Method) -> None:
    """Replace a patch; after an error, restore everything that patches change."""
    before = [
        (part, type(part), dict(vars(part)), [(table, dict(table)) for table in _tables(part)])
        for part in module.modules()
    ]
    try:
        info._replace(modules=()).remove(module)
        method.apply(module, reusable=info.modules)
    except BaseException:
        for part, kind, attributes, tables in before:
            part.__class__ = kind
            vars(part).clear()
            vars(part).update(attributes)
            for table, content in tables:
                table.clear()
                table.update(content)
        raise
    unused = set(info.modules) - set(getattr(module, PATCH_INFO).modules)
    for part in list(module.modules()):
        for name in unused:
            part._modules.pop(name, None)


def _tables(module: nn.Module) -> tuple[Any, ...]:
    """Return the dicts inside a module that patches change."""
    return module._modules, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs


def unpatch(model: Model) -> Model:
    """Remove what `patch` added: the model computes the same as before, to the bit.

    Args:
        model: the patched model, or a pipeline whose `unet` or `transformer` is patched.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is not a module, and has none inside.
        ValueError: `model` is not patched.
    """
    modules = _candidates("unpatch", model)
    for module in modules:
        info = getattr(module, PATCH_INFO, None)
        if info is not None:
            info.remove(module)
            return model
    parts = (part for module in modules for part in module.modules())
    patched = next((type(part).__name__ for part in parts if PATCH_INFO in vars(part)), None)
    raise ValueError(
        f"tokred_kernels.unpatch: this {type(model).__name__} is not patched"
        + ("" if patched is None else f", but the {patched} inside it is: give that")
    )


def patched_method(model: Any) -> Method | None:
    """Return the method that `model` is patched with, including its settings, or None.

    Save it as `{"method": method.name, **dataclasses.asdict(method)}`, which is JSON, and patch a new model with
    `patch(model, **saved)`. A process group (ALGM's `group`) and a generator (ToMeSD's `generator`) cannot be saved:
    set them to None first by `dataclasses.replace`, and give them again in `patch(model, **{**saved, "group": group})`.

    Args:
        model: a model, or a pipeline with a `unet` or `transformer`.

    Raises:
        TypeError: `model` is not a module, and has none inside.
    """
    found = (getattr(module, PATCH_INFO, None) for module in _candidates("patched_method", model))
    return next((info.method for info in found if info is not None), None)


def _candidates(function: str, model: Any) -> list[nn.Module]:
    """Return `model` and the denoisers of a pipeline, as far as they are modules."""
    inside = (model, *(getattr(model, name, None) for name in DENOISERS))
    modules = [module for module in inside if isinstance(module, nn.Module)]
    if not modules:
        raise TypeError(f"tokred_kernels.{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    return modules
