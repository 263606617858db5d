# SPDX-License-Identifier: MIT
import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"

# benchmarks/ is not installed, and the folder of these tests has the same name: load it by its path.
if "benchmarks" not in sys.modules or getattr(sys.modules["benchmarks"], "__file__", None) is None:
    spec = importlib.util.spec_from_file_location(
        "benchmarks", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = module
    spec.loader.exec_module(module)
