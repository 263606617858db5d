# SPDX-License-Identifier: MIT
"""Runs of which something fails, and runs that are cut short."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tokred_kernels as tk
from benchmarks import machine, micro, record, run
from benchmarks.providers import CLONE, COMPILED, Provider

ROOT = Path(__file__).parents[2]
ROW = {"suite": "micro", "provider": "cpu", "median_us": 1.0, "speedup_published": 1.0, "targets": []}


@pytest.fixture
def three(only_tiny, monkeypatch):
    """Run.py on three tiny cases; what it was called with, its exit status and its file."""
    cases = [dataclasses.replace(only_tiny, shape=(batch, 12, 5)) for batch in (1, 2, 3)]
    monkeypatch.setattr(run, "CASES", tuple(cases))
    monkeypatch.setattr(run, "QUICK", run.QUICK._replace(rounds=1))
    monkeypatch.setattr(run, "FULL", run.QUICK)
    monkeypatch.setenv("TOKRED_COMMIT", "c0ffee")
    measure = micro.measure
    done = []

    def counted(case, settings, ceilings):
        done.append(case.name)
        return measure(
            dataclasses.replace(case, quick_compile=False), dataclasses.replace(settings, quick=True), ceilings
        )

    monkeypatch.setattr(micro, "measure", counted)
    return [case.name for case in cases], done


def ran(path, *options):
    code = run.main(["--device", "cpu", "--suite", "micro", "--backend", "cpu", *options])
    return code, json.loads(path.read_text())


def failing(monkeypatch, names, error):
    """Micro.measure raises for these cases."""
    measure = micro.measure

    def sometimes(case, settings, ceilings):
        if case.name in names:
            raise error
        return measure(case, settings, ceilings)

    monkeypatch.setattr(micro, "measure", sometimes)


def test_a_wrong_result_has_no_time(only_tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run.providers, "ours", lambda case: lambda i: tk.unmerge(i.y, i.token_map) + 1)
    path = tmp_path / "run.json"
    code, result = ran(path, "--quick", "--json", str(path))
    assert code == 1 and not result["settings"]["complete"]
    assert [row["provider"] for row in result["rows"]] == ["published", "clone"]
    (failure,) = result["failures"]
    assert (failure["case"], failure["provider"], failure["error"]) == (only_tiny.name, "cpu", "Disagreement")
    assert "of the largest" in failure["text"] and "of the largest" in capsys.readouterr().err


def test_a_complete_run_says_so(three, tmp_path):
    path = tmp_path / "run.json"
    code, result = ran(path, "--json", str(path))
    assert code == 0 and result["settings"]["complete"] and result["failures"] == [] and result["running"] is None
    assert list(dict.fromkeys(row["case"] for row in result["rows"])) == three[0]


def test_a_failed_case_is_recorded_and_the_rest_goes_on(three, monkeypatch, tmp_path):
    names, _ = three
    failing(monkeypatch, names[1:2], RuntimeError("out of something\nat length"))
    path = tmp_path / "run.json"
    code, result = ran(path, "--json", str(path))
    assert code == 1 and not result["settings"]["complete"]
    assert {row["case"] for row in result["rows"]} == {names[0], names[2]}
    expected = {"case": names[1], "provider": None, "error": "RuntimeError", "text": "out of something\nat length"}
    assert result["failures"] == [expected]


def test_a_yardstick_that_fails_loses_its_column_alone(only_tiny, monkeypatch, tmp_path):
    made = micro.providers

    def with_broken(*arguments):
        def compiled(inputs):
            raise NotImplementedError("no compiler")

        def clone(inputs):
            raise RuntimeError("no memory")

        others = [provider for provider in made(*arguments) if provider.name != CLONE]
        return [*others, Provider(COMPILED, compiled), Provider(CLONE, clone)]

    monkeypatch.setattr(micro, "providers", with_broken)
    monkeypatch.setattr(run, "FULL", run.QUICK)
    path = tmp_path / "run.json"
    code, result = ran(path, "--json", str(path))
    assert code == 1 and result["settings"]["complete"]
    assert [row["provider"] for row in result["rows"]] == ["published", "cpu"]
    assert all(row["speedup_compiled"] is None and row["times_clone"] is None for row in result["rows"])
    failures = [(failure["provider"], failure["error"], failure["text"]) for failure in result["failures"]]
    assert failures == [(COMPILED, "NotImplementedError", "no compiler"), (CLONE, "RuntimeError", "no memory")]


def test_a_killed_run_leaves_its_rows(three, monkeypatch, tmp_path):
    names, _ = three
    failing(monkeypatch, names[1:2], KeyboardInterrupt())
    path = tmp_path / "run.json"
    with pytest.raises(KeyboardInterrupt):
        ran(path, "--json", str(path))
    result = json.loads(path.read_text())
    assert {row["case"] for row in result["rows"]} == {names[0]}
    assert result["running"] == names[1] and not result["settings"]["complete"]


NEVER_ENDING = """
import sys, time
from benchmarks import micro, run

run.LONGEST_CASE = {"cpu": 1.0}
micro.measure = lambda *_: time.sleep(100)
run.main(["--op", "unmerge", "--device", "cpu", "--json", sys.argv[1]])
"""


def test_a_case_without_end_is_ended(tmp_path):
    path = tmp_path / "run.json"
    command = [sys.executable, "-c", NEVER_ENDING, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 1 and "Timeout" in done.stderr and "in _run" in done.stderr, done.stderr
    result = json.loads(path.read_text())
    assert result["running"] == next(case.name for case in run.CASES if case.op == "unmerge" and case.device == "cpu")
    assert not result["rows"]


def test_a_resumed_run_keeps_what_there_is_and_runs_what_killed_it_last(three, monkeypatch, tmp_path):
    names, done = three
    path = tmp_path / "run.json"
    with monkeypatch.context() as patch:
        failing(patch, names[1:2], KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            ran(path, "--resume", str(path))
    first = json.loads(path.read_text())["rows"]
    done.clear()
    code, result = ran(path, "--resume", str(path))
    assert done == [names[2], names[1]]
    assert code == 0 and result["settings"]["complete"] and result["failures"] == []
    assert result["rows"][: len(first)] == first
    assert result["ceilings"] == json.loads(path.read_text())["ceilings"]
    done.clear()
    code, again = ran(path, "--resume", str(path))
    assert code == 0 and done == [] and again["rows"] == result["rows"]


def test_ops_one_at_a_time_come_to_the_whole(three, monkeypatch, tmp_path):
    names, done = three
    path = tmp_path / "run.json"
    merge = dataclasses.replace(run.CASES[0], op="merge", targets=())
    monkeypatch.setattr(run, "CASES", (*run.CASES, merge))
    _, result = ran(path, "--resume", str(path), "--op", "unmerge")
    assert done == names and not result["settings"]["complete"]
    _, result = ran(path, "--resume", str(path), "--op", "merge")
    assert done == [*names, merge.name] and {row["case"] for row in result["rows"]} == set(done)
    assert result["settings"]["suite"] == "micro" and result["settings"]["complete"]


@pytest.mark.parametrize("commit", ["another", None])
def test_rows_of_another_commit_are_not_kept(three, monkeypatch, tmp_path, capsys, commit):
    names, done = three
    path = tmp_path / "run.json"
    ran(path, "--resume", str(path))
    done.clear()
    description = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda: {**description, "commit": commit})
    ran(path, "--resume", str(path))
    assert done == names
    assert "commit" in capsys.readouterr().out


def test_minutes_end_a_run_between_cases(three, monkeypatch, tmp_path, capsys):
    names, _ = three
    clock = iter(range(0, 10_000, 40))  # the limit is set, then a look before each case
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    path = tmp_path / "run.json"
    monkeypatch.setattr(micro, "measure", lambda *a: ([{"case": a[0].name, **ROW}], {}))
    code, result = ran(path, "--json", str(path), "--minutes", "1.5")
    assert code == 0 and not result["settings"]["complete"]
    assert [row["case"] for row in result["rows"]] == names[:2]
    assert "1 of 3 cases left" in capsys.readouterr().out


def test_a_lost_device_ends_the_run(three, monkeypatch, tmp_path, capsys):
    names, _ = three
    failing(monkeypatch, names[:1], RuntimeError("an illegal memory access"))

    def lost(device):
        raise RuntimeError("still that illegal memory access")

    monkeypatch.setattr(run, "release", lost)
    path = tmp_path / "run.json"
    code, result = ran(path, "--json", str(path))
    assert code == 1 and [failure["case"] for failure in result["failures"]] == names[:1]
    assert "the device is lost" in capsys.readouterr().err


def test_a_long_error_is_cut():
    assert len(record.told(ValueError("x" * 10_000))["text"]) == record.LONGEST_TEXT


def test_a_tree_without_a_repository_is_told_its_commit(monkeypatch):
    monkeypatch.setattr(machine, "_output", lambda *command: None)
    assert (machine.describe()["commit"], machine.describe()["dirty"]) == (None, None)
    monkeypatch.setenv("TOKRED_COMMIT", "c0ffee")
    assert (machine.describe()["commit"], machine.describe()["dirty"]) == ("c0ffee", None)
