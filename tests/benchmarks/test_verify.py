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


def verified(tmp_path, more="", device="cuda", commit=None, failures=()):
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
    result["failures"] = [{"case": case, "provider": who, "error": error} for case, who, error in failures]
    table.report.write_json(results, result)
    code = verify.main([str(junit), "--results", str(results), "--output", str(output)])
    return code, json.loads(output.read_text()) if output.exists() else None


@pytest.mark.parametrize("op", backends.OPS)
def test_every_op_has_tests_that_a_gpu_can_run(op):
    file, word = verify.TESTED_IN.get(op, (f"test_{op}", ""))
    (path,) = (ROOT / "tests").rglob(file + ".py")
    text = path.read_text()
    assert re.search(rf"def test_\w*{word}", text) and re.search(r"\((backend|everywhere)\b|\"(cuda|triton)\"", text)


@pytest.mark.parametrize("missing", ["gpu.xml", "run.json"])
def test_what_is_not_there_yet_is_told(missing, tmp_path, capsys):
    for name in {"gpu.xml", "run.json"} - {missing}:
        (tmp_path / name).write_text("")
    output = tmp_path / "verified.json"
    with pytest.raises(SystemExit):
        verify.main(
            [str(tmp_path / "gpu.xml"), "--results", str(tmp_path / "run.json"), "--output", str(output)],
        )
    assert f"there is no {tmp_path / missing}: the tests and the micro suite" in capsys.readouterr().err
    assert not output.exists()


def test_only_what_was_tested_and_timed_is_verified(tmp_path, capsys):
    code, found = verified(tmp_path)
    # Triton's merge was tested by its gradient, which is another test of the same file; its unmerge was skipped.
    assert code == 0 and found == {"cuda": ["merge"], "triton": ["merge", "merge_backward"]}
    assert "triton unmerge: not shown right: no passed test in test_unmerge.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "device,commit",
    [
        ("cpu", None),
        ("cuda", "c0ffee"),
    ],
    ids=["no GPU", "another commit"],
)
def test_nothing_is_verified_otherwise(tmp_path, device, commit):
    assert verified(tmp_path, "", device, commit) == (1, None)


def test_nothing_is_verified_of_an_unknown_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(verify.machine, "describe", lambda: {"commit": None})
    assert verified(tmp_path) == (1, None)


TRITON = ["merge", "merge_backward"]


@pytest.mark.parametrize(
    "file,name,cuda,triton",
    [
        ("ops.test_merge", "test_x[cuda]", [], TRITON),
        ("ops.test_merge", "test_x[float32-triton]", ["merge"], []),
        ("ops.test_merge", "test_x", [], []),
        ("ops.test_unmerge", "test_x[cuda]", ["merge"], TRITON),
        ("ops.test_unmerge", "test_x_gradient[cuda]", [], TRITON),
        ("ops.test_merge_wavg", "test_x[triton]", ["merge"], ["merge_backward"]),
        ("ops.test_bipartite_merge", "test_x[cuda]", [], TRITON),
        ("backends.test_triton_lookup", "test_x[16]", ["merge"], TRITON),
        ("backends.test_triton", "test_x", ["merge"], []),
        # Their device is a parameter.
        ("backends.test_triton_lookup", "test_x[cuda-16]", ["merge"], TRITON),
        ("backends.test_triton", "test_x[cuda-16]", ["merge"], []),
        ("test_torch_integration", "test_x", [], []),
        ("benchmarks.test_benchmarks", "test_x", ["merge"], TRITON),
    ],
)
def test_a_failed_test_speaks_against_what_it_is_of(tmp_path, capsys, file, name, cuda, triton):
    case = f'<testcase classname="tests.{file}" name="{name}"><failure/></testcase>'
    assert verified(tmp_path, case) == (0, {"cuda": cuda, "triton": triton})
    assert f"failed: {file.rpartition('.')[2]}::test_x" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_speaks_against_its_ops(tmp_path):
    case = '<testcase classname="" name="tests.ops.test_merge"><error message="collection failure"/></testcase>'
    assert verified(tmp_path, case) == (0, {"cuda": [], "triton": []})


def test_reports_of_parts_count_together(tmp_path):
    verified(tmp_path)
    empty = tmp_path / "empty.xml"
    empty.write_text("<testsuites/>")
    files = [str(empty), str(tmp_path / "gpu.xml"), "--results", str(tmp_path / "run.json")]
    assert verify.main([*files, "--output", str(tmp_path / "both.json")]) == 0
    assert json.loads((tmp_path / "both.json").read_text())["triton"] == TRITON


@pytest.mark.parametrize(
    "provider,error,cuda,triton",
    [
        ("triton", "Disagreement", ["merge"], []),
        (None, "AcceleratorError", [], []),
        ("triton", "OutOfMemoryError", ["merge"], TRITON),
        ("compiled", "BackendCompilerFailed", ["merge"], TRITON),
    ],
)
def test_a_failure_of_the_benchmark_speaks_against_what_it_is_of(tmp_path, provider, error, cuda, triton):
    training = next(case for case in CASES if case.training and case.op == "merge_wavg")
    code, found = verified(tmp_path, failures=[(training.name, provider, error)])
    assert code == 0 and found == {"cuda": cuda, "triton": triton}
