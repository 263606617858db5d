# SPDX-License-Identifier: MIT
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for emulated.py, which the tests here share

from emulated import Emulator, build


@pytest.fixture(scope="session")
def driver():
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulated kernels with")
    return build()


@pytest.fixture(scope="module")
def emulator(driver):
    emulator = Emulator(driver)
    yield emulator
    emulator.close()
