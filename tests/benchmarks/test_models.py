# SPDX-License-Identifier: MIT
"""The model suite: models, unpatched and patched."""

import json

import pytest

from benchmarks import run, table
from benchmarks.families import models
from benchmarks.families.models import ModelCase
from benchmarks.harness import measure, timing
from benchmarks.harness.case import Target

pytestmark = pytest.mark.usefixtures("one_thread")
CASE = ModelCase("test_vit", 2, 16, "cpu", quick=True, targets=(Target("flops_efficiency", 1e-6),))


@pytest.fixture
def measured(brief, monkeypatch, tmp_path):
    """Run the model suite on one small model; return its rows by provider, and its failures."""
    monkeypatch.setattr(run, "MODEL_CASES", (CASE,))

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
    assert (plain["speed_ratio"], plain["flops_ratio"], plain["targets"]) == (1, 1, [])
    assert patched["flops_ratio"] > 1.5 and patched["tokens_left"] < plain["tokens_left"]
    assert patched["targets"][0]["met"] and patched["clock"] == "wall"


def test_patched_and_unpatched_are_compared_by_the_same_clock(measured, monkeypatch):
    def uncapturable(call, sets, turn_seconds):
        if calls:
            raise RuntimeError("it waits for the device")
        calls.append(call)
        return timing.wall_visit(call, sets, turn_seconds)

    calls = []
    monkeypatch.setattr(measure, "event_visit", timing.wall_visit)
    monkeypatch.setattr(measure, "graph_visit", uncapturable)
    monkeypatch.setitem(models.CLOCKS, "cpu", ("events", "graph"))
    rows, failures = measured("cpu")  # only the unpatched model can be captured
    assert rows["unpatched"]["clock"] == "graph" and rows["cpu"]["clock"] == "events" and failures == []
    events = rows["unpatched"]["clocks"]["events"]["images_per_second"]
    assert rows["cpu"]["unpatched_images_per_second"] == events != rows["unpatched"]["images_per_second"]


def test_a_model_that_the_patch_changes_is_not_timed(measured, monkeypatch):
    monkeypatch.setitem(models.SAME_OUTPUT, "float32", -1)
    rows, (failure,) = measured("cpu", code=1)
    assert list(rows) == ["unpatched"]
    assert (failure["provider"], failure["error"]) == ("cpu", "Disagreement")


def test_a_kernel_that_did_not_pass_the_self_check_runs_no_model():
    assert models.reason_against(CASE, "cpu") is None
    for op in ("merge", "token_attention"):
        assert models.reason_against(CASE, "cpu", {("cpu", op): "wrong"}) == "wrong"
        assert models.reason_against(CASE, "auto", {("cpu", op): "wrong"}) is None


def test_the_table_shows_both_by_the_same_clock():
    row = {"provider": "auto", "images_per_second": 200.0, "unpatched_images_per_second": 120.0, "targets": []}
    row |= {"case": CASE.name, "median_us": 1.0, "speed_ratio": 1.67, "flops_ratio": 2.0, "flops_efficiency": 0.83}
    recorded = table.Run.__new__(table.Run)
    recorded.result = {"rows": [row, {**row, "provider": "unpatched", "images_per_second": 150.0}]}
    assert table._model_cells(CASE, recorded)[1:3] == ["120", "200 (auto)"]
