# SPDX-License-Identifier: MIT
"""A test run in which a kernel makes the device unusable. The device is simulated."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

SIMULATED = """
torch.cuda.is_initialized = lambda: True
lost = []


def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


torch.cuda.synchronize = synchronize


@pytest.fixture
def launch():
    return lambda: lost.append(True)  # the error is asynchronous
"""
TESTS = """
import pytest


@pytest.mark.parametrize("turn", range(6))
def test_turn(turn, launch):
    if turn == 2:
        launch()
"""


@pytest.mark.parametrize("processes,passed", [("2", {0, 1, 3, 4, 5}), ("0", {0, 1})])
def test_a_lost_device_ends_its_process(processes, passed, tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text() + SIMULATED)
    (tmp_path / "test_it.py").write_text(TESTS)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-n", processes, f"--junit-xml={report}"]
    # The variables of pytest-xdist would make the inner run one of its workers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [(case.get("name"), case[0].get("message")) for case in cases if len(case)]
    assert {name for name, _ in failed} == {"test_turn[2]"}
    assert any("illegal memory access" in message for _, message in failed)
    assert {case.get("name") for case in cases} - {"test_turn[2]"} == {f"test_turn[{turn}]" for turn in passed}
