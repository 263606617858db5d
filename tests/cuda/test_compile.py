# SPDX-License-Identifier: MIT
"""Every CUDA source compiles for every architecture that ships, without spills and without a stack frame."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).resolve().parents[2] / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a", "100", "120")  # as in CMakeLists.txt
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc on the path")


@pytest.fixture(scope="module")
def compiling(request, tmp_path_factory):
    """What the selected tests compile, as many at once as there are processors: each takes seconds of one."""
    folder = tmp_path_factory.mktemp("cubin")

    def run(source, architecture):
        command = [NVCC, "-std=c++17", "--expt-relaxed-constexpr", "-Werror=all-warnings", f"-arch=sm_{architecture}"]
        command += ["-Xptxas", "-v", "-cubin", "-o", str(folder / f"{source.stem}-{architecture}"), str(source)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    selected = [item.callspec.params for item in request.session.items if item.path == Path(__file__)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {(p["source"], p["architecture"]): pool.submit(run, p["source"], p["architecture"]) for p in selected}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, architecture, compiling):
    done = compiling[source, architecture].result()
    assert done.returncode == 0, done.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert frames, "the compiler reported no kernel"
    assert set(frames) == {("0", "0", "0")}, done.stderr
    assert "cumulative stack size" not in done.stderr, done.stderr  # of functions that a kernel calls
