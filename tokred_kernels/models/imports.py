# SPDX-License-Identifier: MIT
"""Import timm and diffusers, with a clear error if they are missing or too old.

The import also works if the compiled operators of torchvision cannot load.
"""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType

import torch

# Schemas that torchvision's Python code expects, as its compiled library declares them.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
OLDEST_TIMM = (1, 0, 17)
_library: torch.library.Library | None = None  # the schemas live as long as this object


def import_timm() -> ModuleType:
    """Return the timm module.

    Raises:
        ImportError: it is not installed, or too old to be patched.
    """
    timm = import_with_torchvision("timm")
    check_version(timm, OLDEST_TIMM)
    return timm


def import_diffusers() -> ModuleType:
    """Return the diffusers module; raise ImportError if it is not installed."""
    return import_with_torchvision("diffusers")


def check_version(library: ModuleType, oldest: tuple[int, ...]) -> None:
    """Raise ImportError if a library is too old to be patched."""
    name, version = library.__name__, library.__version__
    if tuple(map(int, re.findall(r"\d+", version)[: len(oldest)])) < oldest:
        needed = ".".join(map(str, oldest))
        raise ImportError(
            f"tokred_kernels.patch needs {name} {needed} or later, got {version}: pip install --upgrade {name}"
        )


def import_with_torchvision(library: str) -> ModuleType:
    """Return the module of a library that imports torchvision; an extra of this package has the same name.

    While it is imported, torchvision registers fake kernels for two of its operators. If its compiled library cannot
    load, for example one built for CUDA with a CPU build of torch, the import fails with "operator torchvision::nms
    does not exist". No vision transformer and no diffusion model needs these operators, so this function then declares
    their schemas. If torchvision works or is not installed, it changes nothing.

    Raises:
        ImportError: the library is not installed.
    """
    # The library can be loaded before torchvision if it imports lazily.
    if "torchvision" not in sys.modules:
        _declare_missing_operators()
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ImportError(f'tokred_kernels.patch needs {library}: pip install "tokred_kernels[{library}]"') from error


def _declare_missing_operators() -> None:
    global _library  # noqa: PLW0603
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # not installed: the import of the library raises
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _library is not None:
            raise
        _library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            _library.define(schema)
        # The next import must not find the partly initialized modules of this one.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
