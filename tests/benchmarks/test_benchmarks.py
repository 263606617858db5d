# SPDX-License-Identifier: MIT
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tokred_kernels as tk
from benchmarks import cases, footprint, machine, providers, resident, run, table, timing, traffic
from benchmarks.cases import CASES, Case, Target
from benchmarks.inputs import draw
from benchmarks.model_cases import MODEL_CASES
from benchmarks.providers import BACKWARD_OPS, KERNEL_OPS, Provider
from tokred_kernels import backends

ROOT = Path(__file__).resolve().parents[2]
BRIEF = timing.Budget(rounds=3, turn_seconds=0.0, case_seconds=60)


# Timing


def test_median_and_quantiles():
    assert timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0]) == pytest.approx((3.0, 1.8, 4.2))
    assert timing.quantile([7.0], 0.2) == 7.0
    assert timing.quantile([0.0, 1.0], 1.0) == 1.0


def test_a_drift_of_the_machine_falls_out_of_the_ratio():
    drift = [1.0, 2.0, 4.0, 8.0, 100.0]
    assert timing.ratio([3 * d for d in drift], drift) == pytest.approx(3.0)


def test_providers_take_turns():
    order = []
    visits = {name: lambda name=name: order.append(name) or 1.0 for name in "ABC"}
    seconds = timing.interleave(visits, timing.Budget(2, 0.0, 60))
    assert order == list("ABC" * 3)  # the first round is not counted
    assert seconds == {name: [1.0, 1.0] for name in "ABC"}


def test_a_slow_case_gets_fewer_rounds_but_as_many_for_each():
    seconds = timing.interleave({"a": lambda: 1.0, "b": lambda: 2.0}, timing.Budget(1000, 0.0, 0.0))
    assert [len(s) for s in seconds.values()] == [timing.LEAST_ROUNDS] * 2


def test_a_turn_rotates_among_the_sets():
    seen = []
    timing.wall_visit(seen.append, 3, 1e-4)()
    assert set(seen) == {0, 1, 2}


def test_peak_memory_counts_what_is_held_at_once():
    def call():
        a = torch.ones(1 << 20)
        b = a + 1
        del a
        return b * 2

    assert footprint.peak_bytes(call, "cpu") == pytest.approx(2 * 4 << 20, rel=0.01)


@pytest.mark.skipif(not resident.RESET.exists(), reason="the system does not tell a process's peak memory")
def test_peak_memory_counts_what_another_process_takes():
    case = Case("grid_bipartite_match", "x", (1, 4096, 16), 2048, "cpu", metric_dim=16)
    peak = resident.peak_bytes(case, Provider("published", print))
    scores = 4 * 3072 * 1024
    assert scores <= peak <= 1.5 * scores


# The table of cases


def test_names_are_unique_and_ops_known():
    names = [case.name for case in CASES + MODEL_CASES]
    assert len(set(names)) == len(names)
    assert {case.op for case in CASES} == set(KERNEL_OPS)


def test_every_kernel_op_is_run_by_a_case():
    assert {op for ops in (*KERNEL_OPS.values(), *BACKWARD_OPS.values()) for op in ops} == set(backends.OPS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_has_providers(case):
    case = dataclasses.replace(case, device="cpu")  # nothing is drawn or run
    assert (providers.chain(case) is None) == (case.op == "to_csr")
    names = [provider.name for provider in providers.providers(case, ["reference"], compile_chain=False)]
    assert names[-1] == "reference" and len(names) >= 2 - (case.op == "to_csr")


def test_a_target_over_the_reference_brings_it_in(tiny):
    case = dataclasses.replace(tiny, targets=(Target("speedup_reference", 2),))
    assert [provider.name for provider in providers.providers(case, ["cpu"], False)][-2:] == ["reference", "cpu"]


def test_quick_has_every_target():
    assert all(case.quick for case in CASES + MODEL_CASES if case.targets)


def test_least_bytes_by_hand():
    wavg = Case("merge_wavg", "x", (1, 5, 3), 2, "cpu")  # 5 tokens to 3
    assert traffic.least_bytes(wavg) == 4 * (5 * 3 + 5 + 5 + 2 * 3 + 3 * 3 + 3)
    match = Case("bipartite_match", "x", (1, 5, 3), 2, "cpu", metric_dim=7)
    assert traffic.least_bytes(match) == 4 * (5 * 7 + 5 + 5 + 2 * 3)
    assert traffic.operations(match) == 2 * 3 * 2 * 7
    assert traffic.operations(wavg) == 0
    windows = Case("window_merge", "x", (1, 17, 3), 2, "cpu")  # 17 tokens to 11
    assert traffic.least_bytes(windows) == 4 * (2 * 17 * 3 + 17 + 17 + 2 * 11 + 11 * 3 + 11)
    assert traffic.operations(windows) == 0
    grid = Case("grid_bipartite_match", "x", (1, 15, 3), 5, "cpu", metric_dim=7)  # 3 x 5, two cells, 13 sources
    assert traffic.least_bytes(grid) == 4 * (15 * 7 + 15 + 15 + 2 * 10)
    assert traffic.operations(grid) == 2 * 2 * 13 * 7
    importance = Case("importance_match", "x", (1, 9, 3), 4, "cpu", metric_dim=7)
    assert traffic.least_bytes(importance) == 4 * (9 * 7 + 9 + 9 + 2 * 5 + 4)
    assert traffic.operations(importance) == 2 * 4 * 5 * 7


@pytest.mark.parametrize("op", [op for op in KERNEL_OPS if op.endswith("_match")])
def test_slots_are_those_of_the_maps(op):
    case = Case(op, "x", (2, 17 - (op == "grid_bipartite_match"), 3), 2, "cpu", metric_dim=7)
    output = providers.ours(case)(draw(case, 0))
    assert (output[0] if op == "importance_match" else output).num_out == traffic.slots(case)


def test_a_grid_is_as_square_as_can_be():
    assert Case("window_match", "x", (1, 769, 3), 4, "cpu").grid == (24, 32)
    assert Case("grid_bipartite_match", "x", (1, 64, 3), 4, "cpu").grid == (8, 8)
    assert Case("window_match", "x", (1, 18, 3), 4, "cpu").grid == (1, 17)


def test_a_fair_share_of_windows_merges():
    case = next(case for case in CASES if case.op == "window_merge" and case.device == "cpu")
    windows = case.grid[0] // 2 * (case.grid[1] // 2)
    assert 0.5 <= case.r / windows <= 0.6
    inputs = draw(case, 0)
    packed = tk.window_match(inputs.x, inputs.threshold, count="image", num_prefix=1).packed
    merged = [(case.shape[1] - length) / 3 / windows for length in packed.lengths]
    assert min(merged) == case.r / windows and max(merged) < 0.65


def test_targets_bound_the_right_side():
    assert Target("speedup_published", 15).met(15) and not Target("speedup_published", 15).met(14.9)
    assert Target("median_us", 25).met(25) and not Target("median_us", 25).met(25.1)
    assert str(Target("copy_share", 0.7)) == "at least 70% of the copy bandwidth"
    assert str(Target("speedup_reference", 20)) == "at least 20x the eager reference"
    assert str(Target("matmul_share", 0.5)) == "at least 50% of a matrix product's rate"
    assert str(Target("peak_share_published", 0.25)) == "at most 25% of the published chain's peak memory"
    assert str(Target("peak_per_token", 128)) == "at most 128 bytes of memory a token"
    assert Target("peak_share_published", 0.25).met(0.25) and not Target("peak_share_published", 0.25).met(0.26)
    assert set(table.REACHED) == set(cases.MEASURES)


# The entry point


ROW_FIELDS = {
    *("case", "op", "shape", "dtype", "device", "r", "provider", "clock", "median_us", "p20_us", "p80_us", "rounds"),
    *("speedup_published", "speedup_compiled", "speedup_reference", "times_clone", "bytes", "copy_share", "floor_us"),
    *("launches", "peak_bytes", "peak_per_token", "resident_bytes", "peak_share_published", "targets"),
}


def test_a_run_writes_all_it_should(only_tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "run.json", tmp_path / "run.png"
    arguments = ["--device", "cpu", "--quick", "--op", "unmerge", "--backend", "reference,cpu"]
    assert run.main([*arguments, "--json", str(path), "--markdown", "--plot", str(picture)]) == 0
    result = json.loads(path.read_text())
    assert {"date", "cpu", "threads", "gpu", "driver", "torch", "triton", "commit", "dirty"} <= set(result["machine"])
    assert result["ceilings"]["copy_bytes_per_second"] > 0
    assert [row["provider"] for row in result["rows"]] == ["published", "clone", "reference", "cpu"]
    for row in result["rows"]:
        assert set(row) >= ROW_FIELDS
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
    assert result["rows"][0]["speedup_published"] == 1
    (target,) = result["rows"][3]["targets"]
    assert target["met"] is True and target["bound"] == 1e-6
    assert not result["settings"]["complete"]
    assert "| " + only_tiny.name in capsys.readouterr().out
    assert picture.stat().st_size > 0


def test_shares_of_ceilings_and_of_memory_are_judged(only_tiny, monkeypatch, tmp_path):
    targets = (Target("matmul_share", 1e-9), Target("peak_share_published", 0.25), Target("speedup_reference", 1e-6))
    case = Case("grid_bipartite_match", "tiny", (2, 16, 4), 3, "cpu", metric_dim=4, targets=targets)
    monkeypatch.setattr(run, "CASES", (dataclasses.replace(case, quick=True),))
    peaks = {"published": 1000, "cpu": 300}
    monkeypatch.setattr(resident, "peak_bytes", lambda case, provider: peaks[provider.name])
    path = tmp_path / "run.json"
    assert run.main(["--device", "cpu", "--quick", "--backend", "cpu", "--json", str(path)]) == 0
    rows = {row["provider"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["published", "reference", "cpu"]
    assert [target["met"] for target in rows["cpu"]["targets"]] == [True, False, True]
    assert rows["cpu"]["peak_share_published"] == 0.3 and rows["reference"]["speedup_reference"] == 1
    assert rows["cpu"]["peak_per_token"] == rows["cpu"]["peak_bytes"] / 32


def test_training_is_timed_with_its_gradient(only_tiny, monkeypatch, tmp_path):
    path = tmp_path / "run.json"
    monkeypatch.setattr(run, "CASES", (dataclasses.replace(only_tiny, training=True, targets=()),))
    assert run.main(["--device", "cpu", "--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["pass"] for row in rows} == {"forward and backward"}
    assert {row["provider"] for row in rows} >= {"published", "reference"}


@pytest.mark.gpu
def test_a_gpu_is_timed_by_events_and_by_graphs(monkeypatch, tmp_path):
    case = Case("bipartite_merge", "tiny", (2, 64, 32), 8, "cuda", metric_dim=16, quick=True)
    monkeypatch.setattr(run, "CASES", (case, dataclasses.replace(case, op="merge_wavg", training=True)))
    monkeypatch.setattr(run, "QUICK", BRIEF)
    path = tmp_path / "run.json"
    assert run.main(["--device", "cuda", "--suite", "micro", "--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["provider"] for row in rows} >= {"published", "reference", "triton"}
    for row in (row for row in rows if row["provider"] != "reference"):  # it need not be capturable
        assert set(row["clocks"]) == {"events", "graph"} and row["clock"] == "graph"
        assert row["launches"] > 0 and row["peak_bytes"] > 0 and row["input_sets"] > 1


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--op", "unmrege"], "'unmrege'"),
        (["--backend", "cpu,opencl"], "'opencl'"),
        (["--device", "tpu"], "tpu"),
        (["--threads", "0", "--device", "cpu"], "at least 1"),
        (["--op", "unmerge", "--suite", "model", "--device", "cpu"], "no ops"),
        (["--op", "unmerge", "--backend", "cuda", "--device", "cpu"], "--backend cuda"),
    ],
)
def test_unknown_names_are_told(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_runs_as_a_file_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--op", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "'nothing'" in done.stderr


# The self-check


def verdict(name, reason=None):
    return SimpleNamespace(verdict=name, reason=reason, times_us={})


def test_kernels_that_did_not_pass_are_named_and_not_timed(only_tiny, monkeypatch, tmp_path, capsys):
    found = {
        "cpu": {"unmerge": verdict("wrong", "off by 3"), "merge": verdict("unsupported", "no kernel")},
        "reference": {"unmerge": verdict("passed")},
    }
    monkeypatch.setattr(machine, "verdicts", lambda device: found)
    path = tmp_path / "run.json"
    arguments = ["--device", "cpu", "--quick", "--op", "unmerge"]
    assert run.main([*arguments, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [row["provider"] for row in result["rows"]] == ["published", "clone", "reference"]
    assert result["settings"]["verdicts"] == {
        "cpu": {"unmerge": "wrong", "merge": "unsupported"},
        "reference": {"unmerge": "passed"},
    }
    reason = "unmerge did not pass the self-check: wrong, off by 3"
    assert [line for line in capsys.readouterr().out.splitlines() if "not timed" in line] == [
        f"not timed: cpu: {reason}"
    ]
    with pytest.raises(SystemExit):
        run.main([*arguments, "--backend", "cpu"])
    assert f"--backend cpu: {reason}" in capsys.readouterr().err


def test_the_self_check_runs_for_gpus_only(monkeypatch):
    asked = []
    monkeypatch.setattr(machine.selfcheck, "verdicts", lambda device: asked.append(device) or {"cuda": {}})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert machine.verdicts("cpu") == {} and asked == []
    assert machine.verdicts("cuda") == {"cuda": {}} and asked == [torch.device("cuda", 1)]


# The README's table


def recorded(folder, date, micro_us, complete=True):
    case = next(case for case in CASES if case.device == "cpu" and case.op == "unmerge" and case.targets)
    row = {"case": case.name, "op": "unmerge", "suite": "micro", "median_us": micro_us, "provider": "cpu"}
    value = 1000 / micro_us
    judged = {"target": str(case.targets[0]), "value": value, "met": case.targets[0].met(value)}
    rows = [{**row, "provider": "published", "median_us": 1000.0, "targets": []}, {**row, "targets": [judged]}]
    machine = {"cpu": "Some CPU", "gpu": None, "threads": 2, "torch": "2", "commit": "c0ffee" * 7, "dirty": False}
    settings = {"device": "cpu", "suite": "all", "complete": complete}
    result = {"machine": {**machine, "date": date}, "settings": settings, "rows": rows}
    table.report.write_json(folder / f"{date}.json", result)


def test_table_is_made_of_the_newest_complete_run(tmp_path):
    results, readme = tmp_path / "results", tmp_path / "README.md"
    recorded(results, "2026-01-02", 100.0)
    recorded(results, "2026-01-03", 200.0)
    recorded(results, "2026-01-04", 400.0, complete=False)
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    options = ["--readme", str(readme), "--results", str(results)]

    assert table.main([*options, "--check"]) == 1
    assert "old" in readme.read_text()
    assert table.main(options) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 1 ms | - | - | 200 us (cpu) | 5.0x | at least 6x the published chain | **missed** |" in text
    assert "[2026-01-03.json](results/2026-01-03.json)" in text
    assert "Not measured yet: no GPU at hand." in text and "| (256, 577, 1024), r 23, bf16 | at least 70% of" in text
    assert "| at least 15x the published chain | not measured yet |" in text
    assert table.main([*options, "--check"]) == 0
    readme.write_text(text.replace("5.0x", "50x"))
    assert table.main([*options, "--check"]) == 1


def test_a_readme_without_markers_is_told(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(SystemExit):
        table.main(["--readme", str(readme), "--results", str(tmp_path)])
    assert "results:begin" in capsys.readouterr().err


def test_the_readme_says_what_the_results_say():
    readme = ROOT / "README.md"
    if not readme.exists() or table.BEGIN not in readme.read_text():
        pytest.skip("the README has no table of results")
    assert table.main(["--check"]) == 0
