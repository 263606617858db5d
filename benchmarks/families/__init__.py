# SPDX-License-Identifier: MIT
"""All benchmark cases."""

from __future__ import annotations

from benchmarks.families import attention, lookup, match, merge, windows
from benchmarks.families.models import MODEL_CASES, ModelCase
from benchmarks.harness.case import KERNELS, Case

_ALL: tuple[Case, ...] = match.CASES + windows.CASES + merge.CASES + attention.CASES + lookup.CASES
CASES = tuple(sorted(_ALL, key=lambda case: list(KERNELS).index(case.op)))

__all__ = ["CASES", "MODEL_CASES", "ModelCase"]
