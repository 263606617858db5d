# SPDX-License-Identifier: MIT
"""Every CUDA source compiles for every architecture that ships, without spills and without a stack frame."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).resolve().parents[2] / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100", "120")  # as in CMakeLists.txt
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on the path")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, architecture, tmp_path):
    command = [NVCC, "-std=c++17", "--expt-relaxed-constexpr", "-Werror=all-warnings", f"-arch=sm_{architecture}"]
    command += ["-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "kernel.cubin"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert frames, "the compiler reported no kernel"
    assert set(frames) == {("0", "0", "0")}, done.stderr
    assert "cumulative stack size" not in done.stderr, done.stderr  # of functions that a kernel calls
