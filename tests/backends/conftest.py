# SPDX-License-Identifier: MIT
"""Where the Triton kernels run in these tests: on a GPU, or in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is first imported. If it is not set, tests that take `device` need a GPU, and
test_triton_interpreter.py runs them in processes that set it. With TOKRED_SHUFFLE_SUMS, the interpreter adds terms in
another order.
"""

import importlib.util
import os

import pytest
from support import poison

import tokred_kernels as tk
from tokred_kernels import backends


@pytest.fixture(params=["cpu"] if backends.triton_interprets() else [pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of the tensors. Memory that kernels receive is poisoned, so that a test sees what is not written."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    poison(monkeypatch)
    if os.environ.get("TOKRED_SHUFFLE_SUMS"):
        from sum_orders import shuffle_sums

        shuffle_sums(monkeypatch)
    with tk.use_backend("triton"):
        yield request.param
