# SPDX-License-Identifier: MIT
"""The steps of `make gpu`, and the script that the sanitizer runs, as far as they need no GPU."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tokred_kernels.ops.registry import SPECS

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = ROOT / "Makefile"


def made(*arguments):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", f"PYTHON={sys.executable}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def sanitize():
    """The script that the sanitizer runs, with fewer sizes."""
    spec = importlib.util.spec_from_file_location("sanitize", ROOT / "tests" / "cuda" / "sanitize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CHECKS = {name: (function, sizes[:2]) for name, (function, sizes) in module.CHECKS.items()}
    return module


def gpu_files():
    lines = MAKEFILE.read_text().replace("\\\n", " ")
    return [ROOT / name for name in re.search(r"^GPU_FILES \?= (.*)$", lines, re.M)[1].split()]


def test_make_runs_all_gpu_tests(request):
    assert all(path.exists() for path in gpu_files())
    for item in request.session.items:  # all tests, in a run of the whole suite
        if item.get_closest_marker("gpu") is not None:
            assert any(item.path.is_relative_to(path) for path in gpu_files()), f"GPU_FILES lacks {item.path}"


def test_the_steps_are_in_order():
    done = made("-n", "gpu")
    assert done.returncode == 0, done.stderr
    steps = ["pip install", "check --deep", "-m pytest -m gpu", "--tool memcheck", "--tool racecheck"]
    steps += ["--tool synccheck", "sanitize.py triton", "tune.py", "--suite micro --backend cuda"]
    steps += ["--suite model --backend auto,cuda", "table.py"]
    places = [done.stdout.find(step) for step in steps]
    assert -1 not in places and places == sorted(places)


def test_results_are_collected(tmp_path):
    done = made("gpu-collect", f"TO={tmp_path / 'there'}")
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "there" / "gpu-results.tar.gz") as archive:
        assert {"README.md", "benchmarks/results"} <= set(archive.getnames())
    assert "TO=folder" in made("gpu-collect").stdout


def test_every_op_that_is_sanitized_runs(sanitize, capsys):
    assert sanitize.main(["cpu", "--device", "cpu"]) == 0
    assert "all ops ran on cpu\n" in capsys.readouterr().out


def test_the_sanitizer_continues_after_a_failure(sanitize, capsys):
    ran = []
    sanitize.CHECKS = {
        "wrong": (lambda *_: torch.testing.assert_close(torch.zeros(1), torch.ones(1)), (1,)),
        "left_out": (lambda *_: ran.append("left out"), (1,)),
        "right": (lambda run, size, dtype: ran.append((size, dtype)), (1, 2)),
    }
    assert sanitize.main(["cpu", "--device", "cpu", "--skip", "left_out"]) == 1
    assert ran == [(size, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16) for size in (1, 2)]
    told = capsys.readouterr().err
    assert "wrong, 1, torch.bfloat16: AssertionError" in told and "3 checks failed on cpu" in told
    with pytest.raises(SystemExit):
        sanitize.main(["cpu", "--device", "cpu", "--skip", "everything"])
    assert "--skip must name some of wrong" in capsys.readouterr().err


def test_the_sanitizer_stops_if_the_device_is_lost(sanitize, capsys, monkeypatch):
    def wait(run):
        if ran:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ran = []
    monkeypatch.setattr(sanitize.Run, "wait", wait)
    sanitize.CHECKS = {"stray": (lambda *_: ran.append("stray"), (1, 2))}
    assert sanitize.main(["cpu", "--device", "cpu"]) == 1
    assert ran == ["stray"]
    told = capsys.readouterr().err
    assert "illegal memory access" in told and "the device is lost, and 5 checks did not run" in told


def test_the_sanitizer_skips_unsupported_head_dimensions(sanitize):
    shape = 1, 1, 2, 3, SPECS["lookup_gather"].max_head_dim["triton"] + 1
    sanitize.check_lookup(sanitize.Run("triton", "cpu"), shape, torch.float32)  # it would raise


def test_the_sanitizer_checks_all_triton_kernels(sanitize, capsys):
    pytest.importorskip("triton")
    sanitize.main(["triton", "--filters"])
    names = re.findall(r"--kernel-name kns=(\w+)", capsys.readouterr().out)
    folder = ROOT / "tokred_kernels" / "backends" / "triton"
    written = {
        name for path in folder.glob("*.py") for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    assert set(names) == written and len(written) > 10


def test_the_cuda_kernels_have_the_namespace_that_the_sanitizer_filters_by():
    for path in (ROOT / "csrc" / "cuda").glob("*.cu*"):
        if "__global__" in path.read_text():
            assert "namespace tokred::cuda {" in path.read_text(), path
