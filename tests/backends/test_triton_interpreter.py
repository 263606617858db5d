# SPDX-License-Identifier: MIT
"""The conformance suite on the Triton kernels, in Triton's interpreter: on their usual paths and on others."""

import importlib.util

import pytest
import simulated

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.mark.parametrize("paths", ["usual", "other"])
@pytest.mark.parametrize("family", simulated.FAMILIES)
def test_family(family, paths):
    names = simulated.FAMILIES[family]
    simulated.run(names, {"TRITON_INTERPRET": "1", "TOKRED_TRITON_PATHS": paths})
