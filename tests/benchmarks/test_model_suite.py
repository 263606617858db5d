# SPDX-License-Identifier: MIT
"""Models, unpatched and patched."""

import importlib.util
import json
from types import SimpleNamespace

import pytest

from benchmarks import model_suite, run, table, timing
from benchmarks.cases import Target
from benchmarks.model_cases import ModelCase

CASE = ModelCase("vit_tiny_patch16_224", 1, 16, "cpu", quick=True, targets=(Target("flops_efficiency", 1e-6),))


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The rows of a run of one small model, by provider."""
    if importlib.util.find_spec("timm") is None:  # importing it is left to the package, which knows how
        pytest.skip("timm is not installed")
    monkeypatch.setattr(run, "MODEL_CASES", (CASE,))
    monkeypatch.setattr(run, "QUICK", timing.Budget(rounds=3, turn_seconds=0.0, case_seconds=60))
    monkeypatch.setattr(run.ceilings, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(run.ceilings, "MATRIX_SIZE", {"cpu": 64})

    def rows(backends, code=0):
        path = tmp_path / "run.json"
        arguments = ["--device", "cpu", "--suite", "model", "--quick", "--backend", backends, "--json", str(path)]
        assert run.main(arguments) == code
        result = json.loads(path.read_text())
        return {row["provider"]: row for row in result["rows"]}, result["failures"]

    return rows


def test_models_are_measured(measured):
    rows, _ = measured("auto")
    plain, patched = rows["unpatched"], rows["auto"]
    assert (plain["speed_ratio"], plain["flops_ratio"], plain["serves"]) == (1, 1, {})
    assert patched["flops_ratio"] > 1.5 and patched["tokens_left"] < plain["tokens_left"]
    assert patched["serves"]["merge"] == "cpu" and set(patched["serves"]) == {
        *model_suite.PATCHED_OPS,
        "token_attention",
    }
    (target,) = patched["targets"]
    assert target["met"] and patched["clock"] == "wall"


def test_both_models_are_judged_by_graphs_where_they_can_be(measured, monkeypatch):
    clocks = {"events": timing.wall_visit, "graph": timing.wall_visit}
    monkeypatch.setitem(model_suite.CLOCKS, "cpu", clocks)
    rows, _ = measured("cpu")
    for row in rows.values():
        assert list(row["clocks"]) == ["events", "graph"] and row["clock"] == "graph"
        assert row["speed_ratio"] == row["clocks"]["graph"]["speed_ratio"]

    def uncapturable(call, sets, turn_seconds):
        if calls:
            raise RuntimeError("it waits for the device")
        calls.append(call)
        return timing.wall_visit(call, sets, turn_seconds)

    calls = []
    monkeypatch.setitem(clocks, "graph", uncapturable)  # of the unpatched model alone there is one
    rows, failures = measured("cpu")
    assert rows["unpatched"]["clock"] == "graph" and rows["cpu"]["clock"] == "events" and failures == []
    events = rows["unpatched"]["clocks"]["events"]["images_per_second"]
    assert rows["cpu"]["unpatched_images_per_second"] == events != rows["unpatched"]["images_per_second"]


def test_a_model_that_the_patch_changes_has_no_time(measured, monkeypatch, capsys):
    monkeypatch.setitem(model_suite.SAME_OUTPUT, "float32", -1)
    rows, (failure,) = measured("cpu", code=1)
    assert list(rows) == ["unpatched"]
    assert (failure["provider"], failure["error"]) == ("cpu", "Disagreement")


def test_rows_measured_under_other_verdicts_are_not_kept(measured, monkeypatch, tmp_path, capsys):
    measured("auto")
    resume = ["--device", "cpu", "--suite", "model", "--quick", "--backend", "auto"]
    resume += ["--resume", str(tmp_path / "run.json")]
    monkeypatch.setattr(model_suite, "measure", lambda *_: ([], {}))
    assert run.main(resume) == 0 and "has 1 of 1 cases" in capsys.readouterr().out
    wrong = {"triton": {"merge": SimpleNamespace(verdict="wrong", reason="off by 3")}}
    monkeypatch.setattr(run.machine, "verdicts", lambda device: wrong)
    assert run.main(resume) == 0 and "is not resumed: its verdicts:" in capsys.readouterr().out


def test_a_kernel_that_did_not_pass_the_self_check_runs_no_model():
    assert model_suite.reason_against(CASE, "cpu") is None
    for op in ("merge", "token_attention"):
        assert model_suite.reason_against(CASE, "cpu", {("cpu", op): "wrong"}) == "wrong"
        assert model_suite.reason_against(CASE, "auto", {("cpu", op): "wrong"}) is None


def test_auto_is_for_models(capsys):
    with pytest.raises(SystemExit):
        run.main(["--device", "cpu", "--suite", "micro", "--backend", "auto"])
    assert "--backend auto is for models" in capsys.readouterr().err


def test_the_table_has_both_by_the_same_clock():
    row = {"provider": "auto", "images_per_second": 200.0, "unpatched_images_per_second": 120.0, "targets": []}
    row |= {"case": CASE.name, "median_us": 1.0, "speed_ratio": 1.67, "flops_ratio": 2.0, "flops_efficiency": 0.83}
    recorded = table.Run.__new__(table.Run)
    recorded.result = {"rows": [row, {**row, "provider": "unpatched", "images_per_second": 150.0}]}
    cells = table._model_cells(CASE, recorded)
    assert cells[1:3] == ["120", "200 (auto)"]
