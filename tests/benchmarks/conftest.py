# SPDX-License-Identifier: MIT
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# This folder, a namespace package, has the same name as the benchmarks, a regular package, which is not installed.
sys.path.append(str(ROOT))
if getattr(sys.modules.get("benchmarks"), "__file__", None) is None:
    sys.modules.pop("benchmarks", None)
    importlib.import_module("benchmarks")

from benchmarks import run  # noqa: E402
from benchmarks.families.merge import MergeCase  # noqa: E402
from benchmarks.harness import rates, timing  # noqa: E402
from benchmarks.harness.case import Target  # noqa: E402


@pytest.fixture
def brief(monkeypatch):
    """Measure for as short a time as possible."""
    monkeypatch.setattr(run, "QUICK", timing.Budget(rounds=2, turn_seconds=0.0, case_seconds=60))
    monkeypatch.setattr(run, "FULL", run.QUICK)
    monkeypatch.setattr(rates, "COPY_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(rates, "MATRIX_SIZE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(run, "MODEL_CASES", ())


@pytest.fixture
def tiny(brief, monkeypatch):
    """A case of a few microseconds whose target is met; run.py has no other."""
    case = MergeCase("unmerge", "tiny", (2, 12, 5), 3, "cpu", quick=True, targets=(Target("speedup", 1e-6),))
    monkeypatch.setattr(run, "CASES", (case,))
    return case
