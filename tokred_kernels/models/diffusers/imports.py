# SPDX-License-Identifier: MIT
"""Importing diffusers, also where torchvision's compiled operators cannot load."""

from __future__ import annotations

from types import ModuleType

from tokred_kernels.models.imports import import_beside_torchvision


def import_diffusers() -> ModuleType:
    """The diffusers module; see `import_beside_torchvision`."""
    return import_beside_torchvision("diffusers")
