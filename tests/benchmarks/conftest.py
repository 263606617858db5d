# SPDX-License-Identifier: MIT
import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"

# benchmarks/ is not installed, and the folder of these tests has the same name: load it by its path.
if "benchmarks" not in sys.modules or getattr(sys.modules["benchmarks"], "__file__", None) is None:
    spec = importlib.util.spec_from_file_location(
        "benchmarks", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = module
    spec.loader.exec_module(module)


@pytest.fixture
def tiny():
    """A case of a few microseconds, with a target that it meets."""
    from benchmarks.cases import Case, Target

    return Case("unmerge", "tiny", (2, 12, 5), 3, "cpu", quick=True, targets=(Target("speedup_published", 1e-6),))


@pytest.fixture
def only_tiny(monkeypatch, tiny):
    """The whole of run.py, on one tiny case."""
    from benchmarks import run, timing

    monkeypatch.setattr(run, "CASES", (tiny,))
    monkeypatch.setattr(run, "MODEL_CASES", ())
    monkeypatch.setattr(run, "QUICK", timing.Budget(rounds=3, turn_seconds=0.0, case_seconds=60))
    monkeypatch.setattr(run.ceilings, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(run.ceilings, "MATRIX_SIZE", {"cpu": 64})
    return tiny
