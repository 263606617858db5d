# SPDX-License-Identifier: MIT
"""No bad argument may end the process, hang, or give a wrong value."""

from types import FunctionType

from robustness import misuse

import tokred_kernels as tk
from tokred_kernels.ops.registry import SPECS
from tokred_kernels.patching import METHODS

WITHOUT_ARGUMENTS = {"views", "as_rows"}


def test_no_misuse_crashes_hangs_or_gives_a_wrong_value():
    number, faults = misuse.run()
    assert number > 10000
    assert not faults, "\n".join(faults)


def test_every_public_function_and_every_op_is_misused():
    called = {*misuse.op_calls(), *misuse.stateful_calls()}
    public = {*tk.__all__, *tk.nn.__all__} - misuse.NOT_CALLED
    assert {name for name in public if name not in called} == {"Packing"}  # made by Packing.of
    for kind in (tk.TokenMap, tk.Packing):
        methods = {name for name, value in vars(kind).items() if isinstance(value, (classmethod, FunctionType))}
        with_arguments = {name for name in methods if not name.startswith("_")} - WITHOUT_ARGUMENTS
        assert {f"{kind.__name__}.{name}" for name in with_arguments} <= called
    methods = {f"patch:{method}" for method in (*METHODS, "lookupvit")}
    assert methods - called == {"patch:tomesd"}  # needs diffusers: see tests/methods
    assert set(misuse.recorded_calls()) == {name for name, spec in SPECS.items() if spec.is_registered}
