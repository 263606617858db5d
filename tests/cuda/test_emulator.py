# SPDX-License-Identifier: MIT
"""The conformance suite on the CUDA kernels, in the emulator, with AddressSanitizer."""

import emulated
import pytest
import simulated

FAMILIES = {**simulated.FAMILIES, "paths": ("emulated_paths",)}
del FAMILIES["attention"]  # has no CUDA kernels


@pytest.mark.slow
@pytest.mark.skipif(emulated.COMPILER is None, reason="g++ is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    emulated.build()
    simulated.run(FAMILIES[family], emulated.environment())


def test_the_families_have_all_files():
    files = {path.stem.removeprefix("test_") for path in simulated.FOLDER.glob("test_*.py")}
    names = [name for family in (simulated.FAMILIES | FAMILIES).values() for name in family]
    assert set(names) == files
    assert len(names) == len(files)
