# SPDX-License-Identifier: MIT
"""One suite for all backends: a test that takes `device` runs on each backend in turn.

On a machine with a GPU that is all of them. Without one, the backends of this process are the reference and the C++
kernels. tests/simulated.py runs the suite again in other processes, in Triton's interpreter and in the CUDA emulator,
without the tests that are marked slow.

A module limits its backends with BACKENDS, or with OP to those that have a kernel for it; a test with the marker
`backends`.
"""

import os
import zlib

import emulated
import pytest
import torch
from support import poison

import tokred_kernels as tk
from tokred_kernels import backends
from tokred_kernels.ops.registry import SPECS

SIMULATED = "cuda" if emulated.IN_USE else "triton" if backends.triton_interprets() else None
ON_GPU = ("cuda", "triton")


def backends_of(metafunc):
    """Return the backends that a test runs on: those with a kernel for its op, or those that its marker names."""
    marker = metafunc.definition.get_closest_marker("backends")
    names = marker.args if marker else getattr(metafunc.module, "BACKENDS", backends.BACKENDS)
    op = getattr(metafunc.module, "OP", None)
    return [name for name in names if op is None or name in ("reference", *SPECS[op].backends)]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        if SIMULATED:
            params = [name for name in backends_of(metafunc) if name == SIMULATED]
        else:
            gpu = pytest.mark.gpu
            params = [pytest.param(name, marks=[gpu] * (name in ON_GPU)) for name in backends_of(metafunc)]
        metafunc.parametrize("backend", params, indirect=True)


def can_run(item):
    """Return whether a test makes sense here: its backend takes its dtype, and a simulation runs its own tests only."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    backend = params.get("backend")
    if params.get("dtype") == torch.float64 and backend in ON_GPU:
        return False
    if ("far_rows" if SIMULATED == "cuda" else "emulation") in item.fixturenames:
        return False
    return SIMULATED is None or (backend == SIMULATED and item.get_closest_marker("slow") is None)


def pytest_collection_modifyitems(config, items):
    own = [item for item in items if "/conformance/" in item.path.as_posix()]
    dropped = [item for item in own if not can_run(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]


@pytest.fixture
def backend(request, monkeypatch):
    """The backend that the ops run on. Memory that kernels receive is poisoned: a test sees what they do not write."""
    poison(monkeypatch)
    if emulated.IN_USE:
        # Every test in one of the orders of blocks and with one of the limits, by its name.
        bits = zlib.crc32(request.node.name.encode())
        limit = emulated.SMALL_SHARED if bits & 2 else emulated.H100_SHARED
        emulated.configure(limit, bool(bits & 1))
        emulated.install(monkeypatch)
    elif request.param == "triton" and os.environ.get("TOKRED_TRITON_PATHS") == "other":
        import triton_paths

        triton_paths.take_other_paths(monkeypatch)
        if SIMULATED:
            import sum_orders

            sum_orders.shuffle_sums(monkeypatch)
    with tk.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(backend):
    """The device of the tensors on this backend."""
    return "cuda" if backend in ON_GPU and SIMULATED is None else "cpu"


@pytest.fixture
def emulation(backend):
    """The emulator's own functions, in tests of the emulated CUDA kernels only."""
    return emulated.controls()


@pytest.fixture
def far_rows(device):
    """Five rows of four channels, further apart than 32 bits count. Nothing else of their memory is ever touched.

    AddressSanitizer would touch it, so the emulator does without.
    """
    apart = 2**30 + 8
    return torch.empty(4 * apart + 4, dtype=torch.float16, device=device).as_strided((5, 4), (apart, 1))
