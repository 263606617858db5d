# SPDX-License-Identifier: MIT
"""Inspect and patch a model of any supported library.

Each library has a folder in `models/`. Its `adapter.py` has `supports(model)`, `check(model)`,
`model_spec(model)` and `install(model, info, reducers)`, which do for its models what the functions here describe. Its
`flops.py` has the costs outside the blocks that `tokred_kernels.flops` counts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from tokred_kernels.models.patched import PatchInfo
from tokred_kernels.models.reducer import BlockReducer
from tokred_kernels.models.spec import OWN_BLOCK, PATCH_INFO, SUPPORTED, ModelSpec


def inspect_model(model: Any) -> ModelSpec:
    """Return the `ModelSpec` of an unpatched model.

    Only exact classes are supported: patching would silently discard what a subclass overrides.

    Raises:
        TypeError: the model is not a module.
        NotImplementedError: the model, or a part of it, is not supported.
        ValueError: a module inside the model is already patched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tokred_kernels: model must be a torch.nn.Module, got {type(model).__name__}")
    if not _is_supported(model):
        patched = next((part for part in model.modules() if PATCH_INFO in vars(part)), None)
        if patched is not None:
            raise ValueError(
                f"tokred_kernels.patch: the {type(patched).__name__} inside this {type(model).__name__} is already "
                f"patched ({getattr(patched, PATCH_INFO)})"
            )
        inner = next((part for part in model.modules() if _is_supported(part)), None)
        advice = OWN_BLOCK if inner is None else f"give the {type(inner).__name__} inside it, before anything wraps it"
        raise NotImplementedError(
            f"tokred_kernels.patch: {type(model).__module__}.{type(model).__name__} is not supported; supported are "
            f"{'; and '.join(SUPPORTED.values())}. You can {advice}"
        )
    adapter = _adapter(model)
    adapter.check(model)
    return adapter.model_spec(model)


def model_spec(model: Any) -> ModelSpec:
    """Return the `ModelSpec` of a supported model, patched or not."""
    if hasattr(model, PATCH_INFO) and library_of(model) is not None:
        return _adapter(model).model_spec(model)
    return inspect_model(model)


def install(model: Any, info: PatchInfo, reducers: Callable[[int], BlockReducer]) -> None:
    """Patch a model that `inspect_model` accepts: block number `index` gets the reducer `reducers(index)`."""
    _adapter(model).install(model, info, reducers)


def library_of(model: Any) -> str | None:
    """Return the supported package that defines the model's class or one of its bases, or None."""
    roots = (kind.__module__.partition(".")[0] for kind in type(model).__mro__)
    return next((root for root in roots if root in SUPPORTED), None)


def costs_of(model: Any) -> Any:
    """Return the module with the costs outside the blocks of a supported model."""
    return importlib.import_module(f"tokred_kernels.models.{library_of(model)}.flops")


def _adapter(model: Any) -> Any:
    return importlib.import_module(f"tokred_kernels.models.{library_of(model)}.adapter")


def _is_supported(model: Any) -> bool:
    return library_of(model) is not None and _adapter(model).supports(model)
