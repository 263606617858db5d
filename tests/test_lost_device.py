# SPDX-License-Identifier: MIT
"""Runs of tests in which kernels take the device away, on a device that only pretends to be there."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
PRETENCE = """
import pytest
import torch

lost = []
torch.cuda.is_initialized = lambda: True


def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nand so on")


torch.cuda.synchronize = synchronize


@pytest.fixture
def launch():
    return lambda: lost.append(True)  # nothing is known of it until someone waits
"""
SOUND = """
import pytest

@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("turn", range(8))
def test_sound(turn, backend):
    pass
"""
# Its CUDA kernels alone lose the device.
BROKEN = """
import pytest

@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("turn", range(8))
def test_broken(turn, backend, launch):
    if backend == "cuda":
        launch()
"""


@pytest.fixture
def run(tmp_path):
    """Outcomes by test, and texts of what failed, of a run of the three files."""
    (tmp_path / "conftest.py").write_text(PRETENCE)
    (tmp_path / "test_a.py").write_text(SOUND)
    (tmp_path / "test_b.py").write_text(BROKEN)
    (tmp_path / "test_c.py").write_text(SOUND)

    def function(*arguments):
        # The run that this test is of may be one of pytest-xdist's, whose variables are not for the one inside.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        report = tmp_path / "report.xml"
        command = (sys.executable, "-m", "pytest", "-p", "lost_device", "-q", f"--junit-xml={report}", *arguments)
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment | {"PYTHONPATH": str(HERE)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert report.exists(), done.stdout
        outcomes, texts = {}, []
        for case in ElementTree.parse(report).iter("testcase"):
            failed = [child for child in case if child.tag in ("failure", "error")]
            test = case.get("classname"), case.get("name")
            outcomes[test] = outcomes.get(test, "passed") if not failed else "failed"
            texts += [child.get("message") for child in failed]
        return outcomes, texts

    return function


def outcomes_of(outcomes, file, backend=""):
    return [outcome for (module, name), outcome in outcomes.items() if module == file and backend in name]


def test_a_lost_device_ends_its_process_and_the_rest_goes_on_in_another(run):
    pytest.importorskip("xdist")
    outcomes, texts = run("-n", "2")
    for file in ("test_a", "test_c"):
        assert outcomes_of(outcomes, file) == ["passed"] * 16
    assert outcomes_of(outcomes, "test_b", "triton") == ["passed"] * 8
    assert outcomes_of(outcomes, "test_b", "cuda") == ["failed"] * 8
    assert sum("illegal memory access" in text for text in texts) in (3, 4)  # of two processes both may try a last one
    assert sum("not run: 3 tests like it" in text for text in texts) in (4, 5)


def test_without_other_processes_the_run_ends_and_reports(run):
    outcomes, texts = run()
    assert outcomes_of(outcomes, "test_a") == ["passed"] * 16
    assert outcomes_of(outcomes, "test_b") == ["failed"]
    assert not outcomes_of(outcomes, "test_c")
    assert any("illegal memory access" in text for text in texts)


@pytest.mark.parametrize("processes", ["0", "2"])
def test_what_is_left_after_the_minutes_fails(run, processes):
    pytest.importorskip("xdist")
    outcomes, texts = run("--minutes", "1e-9", "-n", processes)
    assert list(outcomes.values()) == ["failed"] * 48
    assert all("not run: the minutes" in text for text in texts)
