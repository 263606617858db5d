# SPDX-License-Identifier: MIT
"""Every example runs as a user would run it, and prints what it should."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

from tokred_kernels.models.imports import import_with_torchvision

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "ops": ["197 tokens become 181", "165 tokens; the sizes add up to 197", r"relative error 0\.\d+", "100 tokens"],
    "patch_timm": [r"plain: 2\.\d+ GFLOPs", r"r = 16: 1\.\d+ GFLOPs, .* of 197 tokens", "restored: True"],
    "patch_transformers": ["plain: 197 tokens", "tome: 101 tokens", "evit: 100 tokens"],
    "segment_algm": [r"flat regions: \d\d of 257 tokens, \d+%", r"output: \(2, 19, 256, 256\)"],
    "diffusion": [r"plain: \(1, 64, 64, 3\)", r"ratio 0\.5: .* mean difference 0\.\d*[1-9]", "restored: True"],
}
NEEDED = {"patch_timm": "timm", "segment_algm": "timm", "patch_transformers": "transformers", "diffusion": "diffusers"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def torchvision():
    """Make torchvision importable, which the examples import through timm and other libraries."""
    if importlib.util.find_spec("torchvision") is not None:
        import_with_torchvision("torchvision")


def test_every_example_is_tested():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_runs(name, capsys):
    if name in NEEDED and importlib.util.find_spec(NEEDED[name]) is None:
        pytest.skip(f"{NEEDED[name]} is not installed")
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for pattern in EXPECTED[name]:
        assert re.search(pattern, printed), printed
