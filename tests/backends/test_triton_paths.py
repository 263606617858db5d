# SPDX-License-Identifier: MIT
"""The same as test_triton_interpreter.py with other paths of the kernels and another order of sums.

It is another file so that pytest-xdist can run both at once.
"""

import pytest
import simulated


@pytest.mark.slow
@pytest.mark.parametrize("family", simulated.INTERPRETED)
def test_family(family):
    # float16 runs on the usual paths only: the paths do not depend on which 16-bit dtype it is.
    environment = {"TRITON_INTERPRET": "1", "TOKRED_TRITON_PATHS": "other"}
    simulated.run(simulated.INTERPRETED[family], environment, "-k", "not torch.float16")
