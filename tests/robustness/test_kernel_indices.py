# SPDX-License-Identifier: MIT
"""The CPU kernels check the indices that they follow, also of tensors that changed after Python checked them.

Each call runs in a child process, because a kernel without the check writes outside of its tensors.
"""

import os

import pytest
import torch

from tokred_kernels.backends.native.build_match_map import build_match_map
from tokred_kernels.backends.native.window_map import window_map
from tokred_kernels.partition import Partition
from tokred_kernels.windows import Windows

FAR = 2**30
NO_RANK = 2**31 - 1
PACKED = {"counts": [1, 2], "starts_in": [0, 4, 10], "starts_out": [0, 3]}
RANKED = {"partner": [[0, 1, 0], [0, 1, 2]], "rank": [[0, 1, NO_RANK], [0, 1, 2]]}
WINDOWS = {"counts": [1, 2], "starts_out": [0, 7]}


def match(**wrong):
    """Build the map of two packed images: 1 of 4 tokens and 2 of 6 tokens join."""
    given = {name: torch.tensor(entries, dtype=torch.int32) for name, entries in {**PACKED, **RANKED, **wrong}.items()}
    return build_match_map(partition=Partition(0, 2, 3, 3, 0, 0, False, 0), num_tokens=10, num_out=7, **given)


def windows(**wrong):
    """Build the map of two images of 8 tokens: 1 and 2 windows of 2 tokens merge."""
    given = {name: torch.tensor(entries, dtype=torch.int32) for name, entries in {**WINDOWS, **wrong}.items()}
    return window_map(torch.rand(2, 4), Windows(0, 2, 4, 1, 2), 0, num_out=13, **given)


def error_in_a_child(call, **wrong):
    """Return the error that the call raises, "" if it returns, or the status of a process that died."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            call(**wrong)
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return text if status == 0 else f"died with {status}"


@pytest.mark.parametrize("call", [match, windows])
def test_right_indices_raise_nothing(call):
    call()
    assert error_in_a_child(call) == ""


@pytest.mark.parametrize(
    ("call", "argument", "entries"),
    [
        (match, "counts", [-1, 2]),
        (match, "counts", [1, FAR]),
        (match, "starts_in", [-FAR, 4, 10]),
        (match, "starts_in", [0, 4, FAR]),
        (match, "starts_in", [0, 10, 4]),
        (match, "starts_in", [0, 2, 10]),
        (match, "starts_out", [0, FAR]),
        (match, "starts_out", [-FAR, 3]),
        (match, "partner", [[FAR, 1, 0], [0, 1, 2]]),
        (match, "rank", [[FAR, FAR, 0], [0, 1, 2]]),
        (windows, "counts", [-1, 2]),
        (windows, "counts", [1, FAR]),
        (windows, "starts_out", [0, FAR]),
        (windows, "starts_out", [-FAR, 7]),
    ],
)
def test_wrong_indices_raise(call, argument, entries):
    error = error_in_a_child(call, **{argument: entries})
    assert argument in error.partition(" must hold values")[0], error
    assert "must hold values" in error
