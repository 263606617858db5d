# SPDX-License-Identifier: MIT
"""Calls of the CUDA runtime around a launch, on the emulated runtime: attributes, errors, and whether kernels load."""

import contextlib
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulated import EMULATION

from tokred_kernels.backends import native


@pytest.fixture(scope="module")
def scenario(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated runtime with")
    program = tmp_path_factory.mktemp("runtime") / "runtime"
    sources = [Path(__file__).with_name("runtime.cpp"), EMULATION / "emulator.cpp"]
    flags = ["-std=c++17", "-pthread", "-Wall", "-Werror", f"-I{EMULATION}", "-DTOKRED_EMULATION"]
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True)

    def run(*arguments):
        done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True)
        return dict(line.split(" ", 1) for line in done.stdout.splitlines())

    return run


def test_two_threads_with_different_shared_memory_sizes_both_launch(scenario):
    assert scenario("two_threads") == {"B": "ok", "A": "ok"}


def test_the_shared_memory_attribute_is_set_once_per_kernel_and_device(scenario):
    assert scenario("attribute_calls") == {
        "small": "0",
        "large": "1",
        "larger": "1",
        "smaller": "1",
        "other_kernel": "2",
        "other_device": "3",
        "other_device_again": "3",
    }


def test_a_failed_launch_does_not_fail_the_next_one(scenario):
    result = scenario("errors")
    assert result["too_large"] == "too_large: invalid argument"
    assert (result["pending"], result["next"]) == ("0", "ok")


def test_an_error_of_another_library_is_neither_reported_nor_cleared(scenario):
    result = scenario("errors")
    assert (result["after_foreign"], result["foreign"]) == ("ok", "100")


@pytest.mark.parametrize(
    "status,driver,capability,reason",
    [
        (0, 13000, 90, ""),
        (35, 0, 90, "no NVIDIA driver is installed"),
        (35, 12040, 90, "the driver supports CUDA 12.4, but the kernels were built with CUDA 13.0; update the driver"),
        (222, 12090, 90, "the driver supports CUDA 12.9, but the kernels were built with CUDA 13.0; update the driver"),
        (209, 13000, 75, "the GPU is sm_75, but the kernels need sm_80 or newer"),
        (98, 13000, 75, "the GPU is sm_75, but the kernels need sm_80 or newer"),
        (209, 13000, 120, "the GPU is sm_120, but the kernels were built for 80 90a; reinstall with TOKRED_CUDA"),
        (100, 13000, 90, "another error"),
    ],
)
def test_the_reason_why_kernels_do_not_load(scenario, status, driver, capability, reason):
    result = scenario("load", status, driver, capability)
    assert result["reason"].startswith(reason) and bool(result["reason"]) == bool(reason)
    assert result["pending"] == "0"


@pytest.fixture
def devices(monkeypatch):
    """Two GPUs; the second cannot run the kernels. `asked` lists the devices that were current at each query."""
    state = SimpleNamespace(current=0, asked=[])

    @contextlib.contextmanager
    def device(index):
        before, state.current = state.current, index
        yield
        state.current = before

    def why_unusable():
        state.asked.append(state.current)
        return "" if state.current == 0 else "the GPU is sm_75"

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(native, "CUDA", SimpleNamespace(why_unusable=why_unusable))
    native.cuda_failure.cache_clear()
    yield state
    native.cuda_failure.cache_clear()


def test_cuda_failure_asks_once_per_device_with_that_device_current(devices):
    for _ in range(2):
        assert native.cuda_failure(1) == "the GPU is sm_75"
        assert native.cuda_failure(0) is None
    assert devices.asked == [1, 0] and devices.current == 0


def test_cuda_failure_without_cuda_kernels(monkeypatch, devices):
    monkeypatch.setattr(native, "CUDA", None)
    assert "no CUDA kernels" in native.cuda_failure(0)


def test_cuda_failure_raises_what_the_query_raises(monkeypatch, devices):
    def fails():
        raise RuntimeError("no such device")

    monkeypatch.setattr(native, "CUDA", SimpleNamespace(why_unusable=fails))
    with pytest.raises(RuntimeError, match="no such device"):
        native.cuda_failure(0)
