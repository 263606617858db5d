# SPDX-License-Identifier: MIT
"""Hooks by which a run of the tests outlives a kernel that takes the device from its process, or never ends.

After an illegal access CUDA refuses whatever follows in that process, and every later test would fail for a kernel
that it never ran. So the process ends with the test at fault, and pytest-xdist gives another what is left; where that
happens again and again, the rest of the file is not tried on that backend. What was not tried has failed: nothing
vouches for it.
"""

import os
import re
import tempfile
import time
from pathlib import Path

import pytest
import torch

MOST_CRASHES = 3  # each costs the start of a process
BACKENDS = ("cuda", "triton")
CRASHED, DEADLINE = pytest.StashKey[Path](), pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption("--minutes", type=float, help="start no test after so many: those that are left fail")


def pytest_configure(config):
    """The run's own process decides; pytest-xdist's are told."""
    told = getattr(config, "workerinput", None)
    if told is None:
        minutes = config.getoption("--minutes")
        handle, name = tempfile.mkstemp(prefix="crashed-tests-")
        os.close(handle)
        told = {"deadline": time.time() + 60 * minutes if minutes is not None else float("inf"), "crashed": name}
    config.stash[DEADLINE], config.stash[CRASHED] = told["deadline"], Path(told["crashed"])


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput |= {"deadline": node.config.stash[DEADLINE], "crashed": str(node.config.stash[CRASHED])}


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        config.stash[CRASHED].unlink(missing_ok=True)


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, sched):
    """In the run's own process, for each test in which another ended."""
    with sched.config.stash[CRASHED].open("a") as file:
        print(crashitem, file=file)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time.time() > item.config.stash[DEADLINE]:
        pytest.fail("not run: the minutes that were given are over", pytrace=False)
    crashed = item.config.stash[CRASHED].read_text().splitlines()
    if sum(subject(test) == subject(item.nodeid) for test in crashed) >= MOST_CRASHES:
        pytest.fail(f"not run: {MOST_CRASHES} tests like it have ended their process", pytrace=False)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """What a kernel did wrong without anyone waiting for it is told of the test that launched it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid):
    """All is told of the test: the process may end."""
    reason = lost_device()
    if reason is None:
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)  # in order, CUDA's own would wait for the device
    pytest.exit(f"{nodeid} lost the device to this process: {reason}", returncode=pytest.ExitCode.TESTS_FAILED)


def lost_device():
    """Why nothing more can run on the device in this process; None where it can."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def subject(nodeid):
    """What a test speaks of: its file, and the backends among its parameters."""
    file, _, name = nodeid.partition("::")
    parameters = re.split(r"[^A-Za-z0-9_]+", name.partition("[")[2])
    return file, *(backend for backend in BACKENDS if backend in parameters)
