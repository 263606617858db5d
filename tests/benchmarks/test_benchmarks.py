# SPDX-License-Identifier: MIT
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import golden

import tokred_kernels as tk
from benchmarks import agreement, cases, footprint, published, run, table, timing, traffic, verify
from benchmarks.cases import CASES, MODEL_CASES, Case, ModelCase, Target
from benchmarks.providers import KERNEL_OPS, Provider, draw
from tokred_kernels.partition import every_other

ROOT = Path(__file__).resolve().parents[2]
BRIEF = timing.Budget(rounds=3, turn_seconds=0.0, case_seconds=60)
TINY = Case("unmerge", "tiny", (2, 12, 5), 3, "cpu", quick=True, targets=(Target("speedup_published", 1e-6),))


# The published chain


@pytest.mark.parametrize("name", ["tome_0.npz", "tome_1.npz", "tome_2.npz"])
def test_published_chain_reproduces_the_authors_code(name):
    arrays, settings = golden(name)
    plan = published.bipartite_plan(arrays["metric"], **settings)
    x = arrays["x"]
    for mode in ("mean", "sum", "amax"):
        torch.testing.assert_close(plan.merge(x, mode), arrays[f"merged_{mode}"])
    merged, size = published.merge_wavg(plan.merge, x, arrays["size"])
    torch.testing.assert_close(merged, arrays["merged_wavg"])
    torch.testing.assert_close(size, arrays["merged_size"])
    torch.testing.assert_close(published.merge_source(plan.merge, x), arrays["source"])
    if "unmerged" in arrays:
        torch.testing.assert_close(plan.unmerge(arrays["merged_wavg"]), arrays["unmerged"])


def test_published_kth_chain_reproduces_the_authors_code():
    arrays, settings = golden("tome_kth_0.npz")
    plan = published.kth_plan(arrays["metric"], settings["k"])
    torch.testing.assert_close(plan.merge(arrays["x"]), arrays["merged_mean"])
    torch.testing.assert_close(plan.unmerge(arrays["merged_mean"]), arrays["unmerged"])


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("tokens,r", [(16, 3), (197, 16), (50, 100)])
def test_published_plan_is_the_reference_map(tokens, r, class_token):
    metric = torch.randn(3, tokens, 32)
    with tk.use_backend("reference"):
        expected = tk.bipartite_match(metric, r, class_token=class_token)
    plan = published.bipartite_plan(metric, r, class_token=class_token)
    assert torch.equal(published.destinations(plan, expected.num_out, tokens), expected.dest)


def test_published_kth_plan_is_the_reference_map_tail_included():
    metric = torch.randn(2, 38, 16)
    with tk.use_backend("reference"):
        expected = tk.kth_bipartite_match(metric, 4)
    assert torch.equal(published.destinations(published.kth_plan(metric, 4), expected.num_out, 38), expected.dest)


def test_published_random_plan_is_the_reference_map_of_the_same_draw():
    metric = torch.randn(2, 40, 16)
    with tk.use_backend("reference"):
        torch.manual_seed(3)
        expected = tk.random_bipartite_match(metric, 11)
    torch.manual_seed(3)
    assert torch.equal(published.destinations(published.random_plan(metric, 11), 29, 40), expected.dest)


# Agreement


def proved(dest, metric, tie=1e-5, class_token=True):
    agreement.prove_choice(dest, metric, every_other(metric.shape[1], 3, None, class_token, False), tie)


@pytest.mark.parametrize("class_token", [False, True])
def test_a_right_map_is_proved(class_token):
    metric = torch.randn(2, 20, 8)
    proved(tk.bipartite_match(metric, 3, class_token=class_token).dest, metric, class_token=class_token)


@pytest.mark.parametrize(
    "wrong,words",
    [
        (lambda dest: dest.roll(1, 1), "not in its slot"),
        (lambda dest: torch.where(dest < 3, 2 - dest, dest), "not in order"),
        (lambda dest: torch.where(dest == 2, -1, dest), "nowhere"),
    ],
)
def test_a_wrong_map_is_not_proved(wrong, words):
    metric = torch.randn(1, 20, 8)
    dest = tk.bipartite_match(metric, 3, class_token=True).dest
    with pytest.raises(agreement.Disagreement, match=words):
        proved(wrong(dest), metric)


def test_a_map_of_another_metric_is_not_proved():
    with pytest.raises(agreement.Disagreement, match="similar"):
        proved(tk.bipartite_match(torch.randn(2, 20, 8), 3, class_token=True).dest, torch.randn(2, 20, 8))


@pytest.mark.parametrize("op", list(KERNEL_OPS))
def test_wrong_results_are_found(op):
    case = Case(op, "tiny", (2, 24, 6), 4, "cpu", metric_dim=8)
    inputs, other = draw(case, 0), draw(case, 1)
    right, wrong = run.providers.ours(case, "reference"), None
    agreement.check(case, Provider("reference", right, "reference"), inputs)
    if op == "random_bipartite_match":
        wrong = Provider("reference", lambda _: tk.random_bipartite_match(inputs.metric.flip(1), case.r), "reference")
    else:
        wrong = Provider("reference", lambda _: right(other), "reference")
    with pytest.raises(agreement.Disagreement, match=op):
        agreement.check(case, wrong, inputs)


def test_nan_is_not_agreement():
    inputs = draw(TINY, 0)
    provider = Provider("cpu", lambda i: tk.unmerge(i.y, i.token_map) * torch.nan)
    with pytest.raises(agreement.Disagreement, match="off by nan"):
        agreement.check(TINY, provider, inputs)


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


# The table of cases


def test_names_are_unique_and_ops_known():
    names = [case.name for case in CASES + MODEL_CASES]
    assert len(set(names)) == len(names)
    assert {case.op for case in CASES} == set(KERNEL_OPS)


def test_quick_has_every_target():
    assert all(case.quick for case in CASES + MODEL_CASES if case.targets)


def test_least_bytes_by_hand():
    wavg = Case("merge_wavg", "x", (1, 5, 3), 2, "cpu")  # 5 tokens to 3
    assert traffic.least_bytes(wavg) == 4 * (5 * 3 + 5 + 5 + 2 * 3 + 3 * 3 + 3)
    match = Case("bipartite_match", "x", (1, 5, 3), 2, "cpu", metric_dim=7)
    assert traffic.least_bytes(match) == 4 * (5 * 7 + 5 + 5 + 2 * 3)
    assert traffic.operations(match) == 2 * 3 * 2 * 7
    assert traffic.operations(wavg) == 0


def test_slots_are_those_of_the_maps():
    for op in KERNEL_OPS:
        case = Case(op, "x", (1, 22, 3), 4, "cpu", metric_dim=7)
        if op.endswith("_match"):
            assert run.providers.ours(case, "reference")(draw(case, 0)).num_out == traffic.slots(case)


def test_targets_bound_the_right_side():
    assert Target("speedup_published", 15).met(15) and not Target("speedup_published", 15).met(14.9)
    assert Target("median_us", 25).met(25) and not Target("median_us", 25).met(25.1)
    assert str(Target("copy_share", 0.7)) == "at least 70% of the copy bandwidth"
    assert set(table.REACHED) == set(cases.MEASURES)


# The entry point


@pytest.fixture
def only_tiny(monkeypatch):
    """The whole of run.py, on one tiny case."""
    monkeypatch.setattr(run, "CASES", (TINY,))
    monkeypatch.setattr(run, "MODEL_CASES", ())
    monkeypatch.setattr(run, "QUICK", BRIEF)
    monkeypatch.setattr(run.ceilings, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(run.ceilings, "MATRIX_SIZE", {"cpu": 64})


ROW_FIELDS = {
    *("case", "op", "shape", "dtype", "device", "r", "provider", "clock", "median_us", "p20_us", "p80_us", "rounds"),
    *("speedup_published", "speedup_compiled", "times_clone", "bytes", "copy_share", "floor_us", "launches"),
    *("peak_bytes", "targets"),
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
    assert "| " + TINY.name in capsys.readouterr().out
    assert picture.stat().st_size > 0


def test_training_is_timed_with_its_gradient(only_tiny, monkeypatch, tmp_path):
    path = tmp_path / "run.json"
    monkeypatch.setattr(run, "CASES", (dataclasses.replace(TINY, training=True, targets=()),))
    assert run.main(["--device", "cpu", "--quick", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["pass"] for row in rows} == {"forward and backward"}
    assert {row["provider"] for row in rows} >= {"published", "reference"}


def test_a_wrong_result_stops_the_run(only_tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run.providers, "ours", lambda case, backend: lambda i: tk.unmerge(i.y, i.token_map) + 1)
    path = tmp_path / "run.json"
    assert run.main(["--device", "cpu", "--quick", "--json", str(path)]) == 1
    assert not path.exists()
    assert "results must agree" in capsys.readouterr().err


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


def test_models_are_measured(monkeypatch, tmp_path):
    if importlib.util.find_spec("timm") is None:  # importing it is left to the package, which knows how
        pytest.skip("timm is not installed")
    monkeypatch.setattr(run, "MODEL_CASES", (ModelCase("vit_tiny_patch16_224", 1, 16, "cpu", quick=True),))
    monkeypatch.setattr(run, "QUICK", BRIEF)
    monkeypatch.setattr(run.ceilings, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(run.ceilings, "MATRIX_SIZE", {"cpu": 64})
    path = tmp_path / "run.json"
    arguments = ["--device", "cpu", "--suite", "model", "--quick", "--backend", "reference", "--json", str(path)]
    assert run.main(arguments) == 0
    plain, patched = json.loads(path.read_text())["rows"]
    assert (plain["provider"], plain["speed_ratio"], plain["flops_ratio"]) == ("unpatched", 1, 1)
    assert patched["flops_ratio"] > 1.5 and patched["tokens_left"] < plain["tokens_left"]


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
    assert "not measured yet: no GPU at hand" in text
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


# What a GPU has shown right

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
