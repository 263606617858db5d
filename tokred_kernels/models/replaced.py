# SPDX-License-Identifier: MIT
"""Modules whose forward somebody else has replaced."""

from __future__ import annotations

from torch import nn


def refuse_replaced(root: nn.Module, kinds: tuple[type[nn.Module], ...], advice: str) -> None:
    """Raise if the forward of a module has been replaced: a change of its class would change nothing, in silence."""
    for name, module in root.named_modules():
        if type(module) in kinds and "forward" in vars(module):
            where = name or type(root).__name__
            raise RuntimeError(
                f"tokred_kernels: the forward of {where} has been replaced, as offloading hooks and caches do; {advice}"
            )
