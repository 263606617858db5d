# SPDX-License-Identifier: MIT
"""Lets libraries import a torchvision whose compiled operators cannot load, such as a CUDA build with a CPU torch.

Such a torchvision fails with "operator torchvision::nms does not exist". Vision transformers and diffusion models need
none of its operators, so declaring the schemas that its Python code expects is enough. This concerns the development
environment only: tests, benchmarks and experiments import this module, the package does not.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # the schemas live as long as this object


def import_library(name: str) -> ModuleType:
    """Import a library that itself imports torchvision, for example timm, transformers or diffusers."""
    declare_missing_operators()
    return importlib.import_module(name)


def declare_missing_operators() -> None:
    """Declare torchvision's operators if they are missing. Do nothing if torchvision works or is not installed."""
    global _library  # noqa: PLW0603
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _library is not None:
            raise
        _library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            _library.define(schema)
        # Remove the modules that the failed import left half initialized.
        for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
