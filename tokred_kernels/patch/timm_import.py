# SPDX-License-Identifier: MIT
"""Importing timm, also where torchvision's compiled operators cannot load."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

# Schemas that torchvision's Python code takes for granted, as its compiled library declares them.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # a Library that is collected takes its schemas with it


def import_timm() -> ModuleType:
    """The timm module.

    timm imports torchvision, and torchvision registers fake kernels for two of its own operators while it is imported.
    Where its compiled library cannot load (a CPU build of torch beside a torchvision built for CUDA, say) these do not
    exist, and the import dies of "operator torchvision::nms does not exist". No vision transformer needs them, so
    their schemas alone are declared then. Where torchvision works, or is not installed, nothing is touched.

    Raises:
        ImportError: timm is not installed.
    """
    if "timm" not in sys.modules:
        _declare_missing_operators()
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ImportError('tokred_kernels.patch needs timm: pip install "tokred_kernels[timm]"') from error


def _declare_missing_operators() -> None:
    global _library  # noqa: PLW0603
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # not there at all: timm will say so itself
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _library is not None:
            raise
        _library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            _library.define(schema)
        # What the failed import left behind would be found half done by the next one.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
