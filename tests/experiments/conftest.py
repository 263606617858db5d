# SPDX-License-Identifier: MIT
import importlib
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def load_experiment(monkeypatch):
    """Import an experiment by name with its folder on the path, and forget its modules afterwards."""
    names = [path.stem for path in EXPERIMENTS.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
