# SPDX-License-Identifier: MIT
"""Whole runs: what they record, how they fail, and how they resume."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tokred_kernels as tk
from benchmarks import run
from benchmarks.families.match import MatchCase
from benchmarks.families.merge import MergeCase
from benchmarks.harness import machine, measure, memory, records, timing
from benchmarks.harness.case import Target

ROOT = Path(__file__).parents[2]
ROW_FIELDS = {
    *("suite", "case", "op", "shape", "dtype", "device", "provider", "clock", "clocks", "median_us", "p20_us"),
    *("rounds", "speedup", "speedup_compiled", "speedup_reference", "times_clone", "copy_share", "least_us"),
    *("peak_bytes", "peak_per_token", "targets"),
}


def ran(path, *options, code=0):
    arguments = ["--device", "cpu", "--suite", "micro", "--quick", "--backend", "reference,cpu", *options]
    assert run.main([*arguments, "--json", str(path)]) == code
    return json.loads(path.read_text())


def providers_of(result):
    return [row["provider"] for row in result["rows"]]


def test_a_run_records_machine_rates_and_rows(tiny, tmp_path, capsys):
    result = ran(tmp_path / "new" / "run.json", "--op", "unmerge")
    assert {"date", "cpu", "threads", "gpu", "driver", "torch", "triton", "commit", "dirty"} <= set(result["machine"])
    assert result["rates"]["copy"] > 0 and set(result["rates"]["matmul"]) == {"float32"}
    assert providers_of(result) == ["baseline", "clone", "reference", "cpu"]
    for row in result["rows"]:
        assert set(row) >= ROW_FIELDS
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
    assert result["rows"][0]["speedup"] == result["rows"][1]["times_clone"] == 1
    (target,) = result["rows"][3]["targets"]
    assert target["met"] is True and target["bound"] == 1e-6
    assert not result["settings"]["complete"]  # as it is a quick one
    assert tiny.name in capsys.readouterr().out


def test_ratios_are_relative_to_the_right_provider(tiny, monkeypatch, tmp_path):
    seconds = {"baseline": [2e-6, 4e-6], "clone": [1e-6, 1e-6], "reference": [8e-6, 8e-6], "cpu": [5e-7, 5e-7]}
    monkeypatch.setattr(measure, "interleave", lambda visits, budget: seconds)
    row = ran(tmp_path / "run.json")["rows"][3]
    assert row["provider"] == "cpu" and row["median_us"] == pytest.approx(0.5)
    assert (row["speedup"], row["speedup_reference"], row["times_clone"]) == pytest.approx((6, 16, 0.5))
    assert row["speedup_compiled"] is None and "times_fused" in row
    assert row["targets"][0]["value"] == row["speedup"]


def test_shares_of_rates_and_of_memory_are_judged(tiny, monkeypatch, tmp_path):
    targets = (Target("matmul_share", 1e-9), Target("peak_share", 0.25), Target("speedup_reference", 1e-6))
    case = MatchCase("grid_bipartite_match", "tiny", (2, 16, 4), 3, "cpu", metric_dim=4, quick=True, targets=targets)
    monkeypatch.setattr(run, "CASES", (case,))
    monkeypatch.setattr(memory, "resident_peak_bytes", lambda case, provider: {"baseline": 1000, "cpu": 300}[provider])
    rows = {row["provider"]: row for row in ran(tmp_path / "run.json", "--backend", "cpu")["rows"]}
    assert list(rows) == ["baseline", "reference", "cpu"]
    assert [target["met"] for target in rows["cpu"]["targets"]] == [True, False, True]
    assert rows["cpu"]["peak_share"] == 0.3 and rows["reference"]["speedup_reference"] == 1
    assert rows["cpu"]["peak_per_token"] == rows["cpu"]["peak_bytes"] / 32


def test_training_is_timed_with_its_gradient(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "CASES", (dataclasses.replace(tiny, training=True, targets=()),))
    assert providers_of(ran(tmp_path / "run.json")) == ["baseline", "reference", "cpu"]


@pytest.mark.gpu
def test_a_gpu_is_timed_by_events_and_by_graphs(brief, monkeypatch, tmp_path):
    match = MatchCase("bipartite_merge", "tiny", (2, 64, 32), 8, "cuda", metric_dim=16, quick=True)
    merge = MergeCase("merge_wavg", "tiny", (2, 64, 32), 8, "cuda", metric_dim=16, quick=True, training=True)
    monkeypatch.setattr(run, "CASES", (match, merge))
    path = tmp_path / "run.json"
    assert run.main(["--device", "cuda", "--suite", "micro", "--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["provider"] for row in rows} >= {"baseline", "reference", "triton"}
    for row in (row for row in rows if row["provider"] != "reference"):  # which graphs need not be able to capture
        assert set(row["clocks"]) == {"events", "graph"} and row["clock"] == "graph"
        assert row["peak_bytes"] > 0 and row["input_sets"] > 1


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--op", "unmrege"], "'unmrege'"),
        (["--backend", "cpu,opencl"], "'opencl'"),
        (["--device", "tpu"], "tpu"),
        (["--minutes", "0"], "--minutes must be more than 0"),
        (["--op", "unmerge", "--suite", "model"], "the model suite has no ops"),
        (["--op", "unmerge", "--backend", "cuda"], "--backend cuda"),
        (["--suite", "micro", "--backend", "auto"], "--backend auto needs --suite model"),
    ],
)
def test_bad_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(["--device", "cpu", *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_runs_as_a_file_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--op", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "'nothing'" in done.stderr


# The self-check


def verdict(name, reason=None):
    return SimpleNamespace(verdict=name, reason=reason)


def test_kernels_that_did_not_pass_are_named_and_not_timed(tiny, monkeypatch, tmp_path, capsys):
    found = {"cpu": {"unmerge": verdict("wrong", "off by 3"), "merge": verdict("unsupported", "no kernel")}}
    monkeypatch.setattr(machine, "verdicts", lambda device: found)
    arguments = ["--device", "cpu", "--suite", "micro", "--quick", "--op", "unmerge"]
    path = tmp_path / "run.json"
    assert run.main([*arguments, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert providers_of(result) == ["baseline", "clone", "reference"]
    assert result["settings"]["verdicts"] == {"cpu": {"unmerge": "wrong", "merge": "unsupported"}}
    reason = "unmerge did not pass the self-check: wrong, off by 3"
    assert f"not timed: cpu: {reason}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main([*arguments, "--backend", "cpu"])
    assert f"--backend cpu: {reason}" in capsys.readouterr().err


def test_the_self_check_runs_for_gpus_only(monkeypatch):
    asked = []
    monkeypatch.setattr(machine.selfcheck, "verdicts", lambda device: asked.append(device) or {"cuda": {}})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert machine.verdicts("cpu") == {} and asked == []
    assert machine.verdicts("cuda") == {"cuda": {}} and asked == [torch.device("cuda", 1)]


# Failures


@pytest.fixture
def three(tiny, monkeypatch):
    """Three tiny cases of complete runs; their names, and those that were measured."""
    cases = [dataclasses.replace(tiny, shape=(batch, 12, 5)) for batch in (1, 2, 3)]
    monkeypatch.setattr(run, "CASES", tuple(cases))
    monkeypatch.setenv("TOKRED_COMMIT", "c0ffee")
    measured, original = [], measure.measure

    def counted(case, settings, rates):
        measured.append(case.name)
        return original(case, dataclasses.replace(settings, quick=True), rates)  # does not compile

    monkeypatch.setattr(measure, "measure", counted)
    return [case.name for case in cases], measured


def full(path, *options, code=0):
    arguments = ["--device", "cpu", "--suite", "micro", "--backend", "cpu", "--resume", str(path), *options]
    assert run.main(arguments) == code
    return json.loads(path.read_text())


def failing(monkeypatch, names, error):
    original = measure.measure

    def sometimes(case, settings, rates):
        if case.name in names:
            raise error
        return original(case, settings, rates)

    monkeypatch.setattr(measure, "measure", sometimes)


def test_a_wrong_kernel_is_reported_and_not_timed(tiny, monkeypatch, tmp_path, capsys):
    def wrong(self, inputs):
        out = tk.unmerge(inputs.y, inputs.token_map)
        return out if out.dtype == torch.float64 else out + 1  # the reference in float64 gives the expected values

    monkeypatch.setattr(MergeCase, "ours", wrong)
    result = ran(tmp_path / "run.json", "--backend", "cpu", code=1)
    assert not result["settings"]["complete"] and providers_of(result) == ["baseline", "clone"]
    (failure,) = result["failures"]
    assert (failure["case"], failure["provider"], failure["error"]) == (tiny.name, "cpu", "Disagreement")
    assert "off by" in failure["text"] and "off by" in capsys.readouterr().err


def test_a_failed_case_is_recorded_and_the_others_run(three, monkeypatch, tmp_path):
    names, _ = three
    failing(monkeypatch, names[1:2], RuntimeError("out of something\nat length"))
    result = full(tmp_path / "run.json", code=1)
    assert not result["settings"]["complete"]
    assert {row["case"] for row in result["rows"]} == {names[0], names[2]}
    expected = {"case": names[1], "provider": None, "error": "RuntimeError", "text": "out of something\nat length"}
    assert result["failures"] == [expected]


def test_a_case_is_complete_without_its_yardsticks(three, monkeypatch, tmp_path):
    def broken(inputs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(MergeCase, "yardsticks", lambda self: {"clone": broken})
    result = full(tmp_path / "run.json", code=1)
    assert result["settings"]["complete"] and set(providers_of(result)) == {"baseline", "cpu"}
    assert all(row["times_clone"] is None for row in result["rows"])
    assert {(f["provider"], f["error"], f["text"]) for f in result["failures"]} == {
        ("clone", "RuntimeError", "no memory")
    }


NEVER_ENDING = """
import sys, time
from benchmarks import run
from benchmarks.harness import measure

run.LONGEST_CASE = {"cpu": 1.0}
measure.measure = lambda *_: time.sleep(100)
run.main(["--op", "unmerge", "--quick", "--device", "cpu", "--json", sys.argv[1]])
"""


def test_a_case_that_hangs_ends_the_process(tmp_path):
    path = tmp_path / "run.json"
    command = [sys.executable, "-c", NEVER_ENDING, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 1 and "Timeout" in done.stderr and "in _run" in done.stderr, done.stderr
    result = json.loads(path.read_text())
    assert result["running"].startswith("unmerge/") and not result["rows"]


def test_a_lost_device_ends_the_run(three, monkeypatch, tmp_path, capsys):
    names, measured = three

    def lost(device):
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(records, "release", lost)
    full(tmp_path / "run.json")
    assert measured == names[:1] and "lost the device" in capsys.readouterr().err


def test_long_errors_are_cut():
    assert len(records.error_facts(ValueError("x" * 10_000))["text"]) == records.LONGEST_TEXT


# Resuming


def test_a_resumed_run_keeps_its_rows_and_runs_the_case_that_killed_it_last(three, monkeypatch, tmp_path):
    names, measured = three
    path = tmp_path / "run.json"
    with monkeypatch.context() as patch:
        failing(patch, names[1:2], KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            full(path)
    killed = json.loads(path.read_text())
    assert {row["case"] for row in killed["rows"]} == {names[0]}
    assert killed["running"] == names[1] and not killed["settings"]["complete"]
    measured.clear()
    result = full(path)
    assert measured == [names[2], names[1]]
    assert result["settings"]["complete"] and result["failures"] == [] and result["running"] is None
    assert result["rows"][: len(killed["rows"])] == killed["rows"] and result["rates"] == killed["rates"]
    measured.clear()
    assert full(path)["rows"] == result["rows"] and measured == []


def test_ops_can_be_run_one_by_one(three, monkeypatch, tmp_path):
    names, measured = three
    path = tmp_path / "run.json"
    merge = dataclasses.replace(run.CASES[0], op="merge", variant="mean", targets=())
    monkeypatch.setattr(run, "CASES", (*run.CASES, merge))
    result = full(path, "--op", "unmerge")
    assert measured == names and not result["settings"]["complete"]
    result = full(path, "--op", "merge")
    assert measured == [*names, merge.name] and {row["case"] for row in result["rows"]} == set(measured)
    assert result["settings"]["complete"]


@pytest.mark.parametrize("commit", ["another", None])
def test_rows_of_another_commit_are_not_kept(three, monkeypatch, tmp_path, capsys, commit):
    names, measured = three
    full(tmp_path / "run.json")
    measured.clear()
    facts = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda: {**facts, "commit": commit})
    full(tmp_path / "run.json")
    assert measured == names and "commit" in capsys.readouterr().out


def test_rows_of_other_verdicts_are_not_kept(three, monkeypatch, tmp_path, capsys):
    names, measured = three
    full(tmp_path / "run.json")
    measured.clear()
    wrong = {"triton": {"merge": verdict("wrong", "off by 3")}}
    monkeypatch.setattr(machine, "verdicts", lambda device: wrong)
    full(tmp_path / "run.json")
    assert measured == names and "is not resumed: its verdicts" in capsys.readouterr().out


def test_minutes_end_a_run_between_cases(three, monkeypatch, tmp_path, capsys):
    names, measured = three
    clock = iter(range(0, 10_000, 40))  # read for the deadline, then before each case
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    result = full(tmp_path / "run.json", "--minutes", "1.5")
    assert not result["settings"]["complete"] and measured == names[:2]
    assert "1 of 3 cases left" in capsys.readouterr().out


def test_the_commit_of_a_tree_without_a_repository(monkeypatch):
    monkeypatch.setattr(machine, "_output", lambda *command: None)
    assert (machine.describe()["commit"], machine.describe()["dirty"]) == (None, None)
    monkeypatch.setenv("TOKRED_COMMIT", "c0ffee")
    assert (machine.describe()["commit"], machine.describe()["dirty"]) == ("c0ffee", None)


# Timing and memory


def test_median_and_quantiles():
    assert timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx((3.0, 1.8, 4.2))
    assert timing.summarise([7.0]) == (7.0, 7.0, 7.0)


def test_a_drift_of_the_machine_cancels_in_the_ratio():
    drift = [1.0, 2.0, 4.0, 8.0, 100.0]
    assert timing.ratio([3 * d for d in drift], drift) == pytest.approx(3.0)


def test_providers_take_turns():
    order = []
    visits = {name: lambda name=name: order.append(name) or 1.0 for name in "ABC"}
    assert timing.interleave(visits, timing.Budget(2, 0.0, 60)) == {name: [1.0, 1.0] for name in "ABC"}
    assert order == list("ABC" * 3)  # with a round of warm-up


def test_a_slow_case_has_fewer_rounds():
    seconds = timing.interleave({"a": lambda: 1.0, "b": lambda: 2.0}, timing.Budget(1000, 0.0, 0.0))
    assert [len(s) for s in seconds.values()] == [timing.LEAST_ROUNDS] * 2


def test_a_turn_rotates_through_the_input_sets():
    seen = []
    timing.wall_visit(seen.append, 3, 1e-4)()
    assert set(seen) == {0, 1, 2}


def test_peak_memory_counts_what_is_held_at_once():
    def call():
        a = torch.ones(1 << 20)
        b = a + 1
        del a
        return b * 2

    assert memory.peak_bytes(call, "cpu") == pytest.approx(2 * 4 << 20, rel=0.01)


@pytest.mark.skipif(not memory.RESET.exists(), reason="the system does not report a process's peak memory")
def test_peak_memory_of_another_process():
    case = MatchCase("grid_bipartite_match", "x", (1, 4096, 16), 2048, "cpu", metric_dim=16)
    scores = 4 * 3072 * 1024
    assert scores <= memory.resident_peak_bytes(case, "baseline") <= 1.5 * scores
