# SPDX-License-Identifier: MIT
"""The conformance suite on the Triton kernels, in Triton's interpreter."""

import pytest
import simulated

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", simulated.INTERPRETED)
def test_family(family):
    simulated.run(simulated.INTERPRETED[family], {"TRITON_INTERPRET": "1"})


@pytest.mark.skipif(not simulated.HAS_TRITON, reason="triton is not installed")
def test_selectors():
    """Only the authors' results: the interpreter takes minutes for the rest, whose kernels the families test."""
    simulated.run(simulated.FAMILIES["selectors"], {"TRITON_INTERPRET": "1"}, "-k", "reproduces")
