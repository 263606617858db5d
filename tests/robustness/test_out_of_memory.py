# SPDX-License-Identifier: MIT
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
NATIVE_SOURCES = FOLDER.parents[1] / "csrc" / "cpu"
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS"),
    pytest.mark.skipif(SANITIZED, reason="the shadow memory of AddressSanitizer exceeds every limit"),
]


@pytest.fixture(scope="module")
def outcomes():
    """Return the exit status and the errors of each op. Without malloc's own reserves a limit acts at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(FOLDER / "scratch_allocations.py")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    lines = map(json.loads, run.stdout.splitlines())
    return {op: (status, errors, run.stderr) for op, status, errors in lines}


@pytest.mark.parametrize(
    "op",
    [
        *("keep_topk", "bipartite_match", "rank_candidates", "window_similarity", "window_map"),
        *("token_attention", "token_attention_backward", "lookup_gather", "lookup_gather_backward"),
        *("lookup_scatter", "lookup_scatter_backward"),
    ],
)
def test_out_of_memory_raises_with_the_name_of_the_op(op, outcomes):
    status, errors, stderr = outcomes[op]
    assert status == 0, stderr
    raised = json.loads(errors)
    assert any(error.startswith(f"RuntimeError: tokred_kernels.{op}: out of memory") for error in raised), raised
    others = [error for error in raised if "DefaultCPUAllocator" not in error]  # window_match runs two ops
    assert all(re.match(r"RuntimeError: tokred_kernels\.\w+: out of memory", error) for error in others), raised


def test_exceptions_are_caught_in_every_parallel_region():
    for source in NATIVE_SOURCES.glob("*.*"):
        regions = source.read_text().count("#pragma omp parallel")
        expected = {"for_each.h": 2, "match_image.h": 1}.get(source.name, 0)
        assert regions == expected, f"{source.name}: use for_each or for_each_dynamic, which rethrow exceptions"
