# SPDX-License-Identifier: MIT
import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def load_example(monkeypatch):
    """Imports an example by name, as running it does: beside its own helpers, all of them forgotten afterwards."""
    names = [path.stem for path in EXAMPLES.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
