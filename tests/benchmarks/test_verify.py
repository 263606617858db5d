# SPDX-License-Identifier: MIT
"""What a GPU has shown right."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import table, verify
from benchmarks.cases import CASES
from tokred_kernels import backends

ROOT = Path(__file__).resolve().parents[2]

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_merge" name="test_equals_float64[float32-cuda-3]"/>
<testcase classname="tests.ops.test_merge" name="test_gradients_equal_float64[triton-sum]"/>
<testcase classname="tests.ops.test_unmerge" name="test_empty[triton]"><skipped message="no GPU"/></testcase>
{more}</testsuite></testsuites>"""


def verified(tmp_path, more="", device="cuda", commit=None):
    junit, results, output = tmp_path / "gpu.xml", tmp_path / "run.json", tmp_path / "verified.json"
    junit.write_text(JUNIT.format(more=more))
    rows = [
        {"suite": "micro", "op": op, "provider": backend, "case": f"{op}/x"}
        for op in ("merge", "unmerge")
        for backend in ("published", "cuda", "triton")
    ]
    training = next(case for case in CASES if case.training and case.op == "merge_wavg")
    rows.append({"suite": "micro", "op": training.op, "provider": "triton", "case": training.name})
    here = verify.machine.describe()["commit"]
    result = {"settings": {"device": device}, "machine": {"gpu": "H100", "commit": commit or here}, "rows": rows}
    table.report.write_json(results, result)
    code = verify.main([str(junit), "--results", str(results), "--output", str(output)])
    return code, json.loads(output.read_text()) if output.exists() else None


@pytest.mark.parametrize("op", backends.OPS)
def test_every_op_has_tests_that_a_gpu_can_run(op):
    file, word = verify.TESTED_IN.get(op, (f"test_{op}", ""))
    (path,) = (ROOT / "tests").rglob(file + ".py")
    text = path.read_text()
    assert re.search(rf"def test_\w*{word}", text) and re.search(r"\((backend|everywhere)\b|\"(cuda|triton)\"", text)


def test_only_what_was_tested_and_timed_is_verified(tmp_path, capsys):
    code, found = verified(tmp_path)
    # Triton's merge was tested by its gradient, which is another test of the same file; its unmerge was skipped.
    assert code == 0 and found == {"cuda": ["merge"], "triton": ["merge", "merge_backward"]}
    assert "triton unmerge: not shown right: no passed test in test_unmerge.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more,device,commit",
    [
        ('<testcase classname="tests.ops.test_merge" name="test_x[cuda]"><failure/></testcase>', "cuda", None),
        ("", "cpu", None),
        ("", "cuda", "c0ffee"),
    ],
    ids=["a test failed", "no GPU", "another commit"],
)
def test_nothing_is_verified_otherwise(tmp_path, more, device, commit):
    assert verified(tmp_path, more, device, commit) == (1, None)
