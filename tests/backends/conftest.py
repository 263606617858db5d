# SPDX-License-Identifier: MIT
"""Where the Triton kernels run in these tests: on a GPU, and without one in Triton's interpreter.

Whether kernels are interpreted is settled when triton is first imported, by TRITON_INTERPRET. So where that is not set,
tests that take `device` are for a GPU, and test_triton_interpreter.py runs them once more in a process where it is.
"""

import importlib.util

import pytest
from support import poison

import tokred_kernels as tk
from tokred_kernels import backends


@pytest.fixture(params=["cpu"] if backends.triton_interprets() else [pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The tensors' device. All memory that kernels are given is poisoned, so that what they leave unwritten shows."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    poison(monkeypatch)
    with tk.use_backend("triton"):
        yield request.param
