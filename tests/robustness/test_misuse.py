# SPDX-License-Identifier: MIT
"""No bad argument may end the process, hang, or give a wrong value."""

from robustness import misuse

import tokred_kernels as tk
from tokred_kernels.ops.registry import SPECS


def test_no_misuse_crashes_hangs_or_gives_a_wrong_value():
    number, faults = misuse.run()
    assert number > 8000
    assert not faults, "\n".join(faults)


def test_every_public_function_and_every_op_is_misused():
    assert {name for name in tk.__all__ if name not in misuse.NOT_CALLED} <= set(misuse.valid_calls())
    assert set(misuse.recorded_calls()) == {name for name, spec in SPECS.items() if spec.is_registered}
