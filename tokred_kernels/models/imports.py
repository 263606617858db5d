# SPDX-License-Identifier: MIT
"""Importing timm, and libraries like it, also where torchvision's compiled operators cannot load."""

from __future__ import annotations

import importlib
import re
import sys
from types import ModuleType

import torch

# Schemas that torchvision's Python code takes for granted, as its compiled library declares them.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
OLDEST_TIMM = (1, 0, 17)
_library: torch.library.Library | None = None  # a Library that is collected takes its schemas with it


def import_timm() -> ModuleType:
    """The timm module; see `import_beside_torchvision`.

    Raises:
        ImportError: it is not installed, or too old for its models to be patched.
    """
    timm = import_beside_torchvision("timm")
    check_version(timm, OLDEST_TIMM)
    return timm


def check_version(library: ModuleType, oldest: tuple[int, ...]) -> None:
    """Raise ImportError where a library is too old for its models to be patched."""
    name, version = library.__name__, library.__version__
    if tuple(map(int, re.findall(r"\d+", version)[: len(oldest)])) < oldest:
        needed = ".".join(map(str, oldest))
        raise ImportError(
            f"tokred_kernels.patch needs {name} {needed} or later, got {version}: pip install --upgrade {name}"
        )


def import_beside_torchvision(library: str) -> ModuleType:
    """The module of a library that imports torchvision, and is an extra of this package by the same name.

    torchvision registers fake kernels for two of its own operators while it is imported. Where its compiled library
    cannot load (a CPU build of torch beside a torchvision built for CUDA, say) these do not exist, and the import dies
    of "operator torchvision::nms does not exist". No vision transformer and no diffusion model needs them, so their
    schemas alone are declared then. Where torchvision works, or is not installed, nothing is touched.

    Raises:
        ImportError: the library is not installed.
    """
    # Not only before the first import: a library that imports lazily may be there, and torchvision not yet.
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
        return  # not there at all: the library will say so itself
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _library is not None:
            raise
        _library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            _library.define(schema)
        # What the failed import left behind would be found half done by the next one.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
