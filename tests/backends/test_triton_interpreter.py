# SPDX-License-Identifier: MIT
"""The conformance suite on the Triton kernels, in Triton's interpreter: on their usual paths and on others."""

import importlib.util

import pytest
import simulated

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
INTERPRETED = {"TRITON_INTERPRET": "1"}


@pytest.mark.parametrize("paths", ["usual", "other"])
@pytest.mark.parametrize("family", [name for name in simulated.FAMILIES if name != "selectors"])
def test_family(family, paths):
    simulated.run(simulated.FAMILIES[family], {**INTERPRETED, "TOKRED_TRITON_PATHS": paths})


def test_selectors():
    """Only the authors' results: the interpreter takes minutes for the rest, whose kernels the families test."""
    simulated.run(simulated.FAMILIES["selectors"], INTERPRETED, "-k", "reproduces")
