# SPDX-License-Identifier: MIT
"""The wheel is built as a user's pip builds it: in isolation, without torch, and it works from elsewhere."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE = """
import torch, tokred_kernels as tk
assert "elsewhere" in tk.__file__, tk.__file__
x = torch.randn(2, 9, 4)
with tk.use_backend("cpu"):
    assert tk.bipartite_merge(x, 3).x.shape == (2, 6, 4)
assert tk.backends.native.CUDA is None
with tk.use_backend("cuda"):
    try:
        tk.merge(x, tk.TokenMap.identity(2, 9))
    except RuntimeError as error:
        assert "no CUDA kernels" in str(error), error
    else:
        raise AssertionError("a CUDA backend that was not built did not raise")
"""


def pip(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_wheel_built_in_isolation_works_elsewhere(tmp_path):
    for _ in range(2):  # once more in the same folder, as after an update
        built = pip(
            "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT), TOKRED_CUDA="0", TOKRED_BUILD_DIR=str(tmp_path / "b")
        )
        assert built.returncode == 0, built.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("tokred_kernels/_native") for name in names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "csrc"))]
    elsewhere = tmp_path / "elsewhere"
    installed = pip("install", "--no-deps", "--target", str(elsewhere), str(wheel))
    assert installed.returncode == 0, installed.stderr[-3000:]
    used = subprocess.run(
        [sys.executable, "-c", USE],
        env={**os.environ, "PYTHONPATH": str(elsewhere)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert used.returncode == 0, used.stderr
