# SPDX-License-Identifier: MIT
"""Which module has a case that is no selector and no mover: attention.py, lookup.py, or none."""

from __future__ import annotations

from types import ModuleType

from benchmarks import attention, lookup
from benchmarks.cases import Case

MODULES = (attention, lookup)


def family(case: Case) -> ModuleType | None:
    """The module that draws the case's inputs, runs it and knows what is right; None for all other cases."""
    return next((module for module in MODULES if case.op in module.HERE), None)
