# SPDX-License-Identifier: MIT
import os
import random

import numpy as np
import pytest
import torch

import tokred_kernels as tk


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Raise an asynchronous CUDA error in the test that launched the kernel."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid):
    """End a process that has lost the device, in which every later test would fail. pytest-xdist starts another one."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # a regular exit would wait for the device
        pytest.exit(f"{nodeid} lost the device: {error}", returncode=pytest.ExitCode.TESTS_FAILED)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or in the suite, and starts and ends on the default backend."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with tk.use_backend("auto"):
        yield


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("triton", marks=pytest.mark.gpu)]
)
def backend(request):
    """Each compiled backend in turn; yields the device its tensors live on."""
    with tk.use_backend(request.param):
        yield "cpu" if request.param == "cpu" else "cuda"


@pytest.fixture
def one_thread():
    """Models as small as those of tests only wait for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_dynamo():
    """No test is near the limit of recompilations by what those before it compiled."""
    torch._dynamo.reset()
