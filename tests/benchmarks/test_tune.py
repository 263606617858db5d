# SPDX-License-Identifier: MIT
"""The winners of benchmarks/tune.py, with fake kernels and clocks; no GPU is needed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import table, tune
from benchmarks.harness import records, trials
from benchmarks.harness.trials import GpuFunctions, relative_error
from tokred_kernels.backends.triton import configs_attention, configs_tables, configs_tuned
from tokred_kernels.backends.triton import token_attention as forward

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = [(64, 64, 4, 2), (64, 128, 4, 2), (128, 128, 4, 2), (128, 32, 8, 4)]
IN_USE = (128, 64, 4, 2)
PLACE = configs_tuned.Place("sm_90", "attention", "bfloat16", 64)


class Kernel:
    """A fake kernel. The blocks in its lists give wrong results, fail, spill, or write nothing."""

    __name__ = "attention_kernel"
    arg_names = ()

    def __init__(self):
        self.wrong, self.failing, self.spilling, self.lazy, self.ran = (), (), (), (), []

    def __getitem__(self, grid):
        def launch(q, k, v, bias, policy, starts, out, row_max, row_sum, *others, **options):
            blocks = blocks_of(options)
            self.ran.append(blocks)
            if blocks in self.failing:
                raise RuntimeError("out of resource: shared memory")
            if blocks not in self.lazy:
                out.copy_(v.transpose(1, 2) * (1.1 if blocks in self.wrong else 1.0))
                row_max.fill_(1.0)
                row_sum.fill_(2.0)
            self.n_spills = 40 if blocks in self.spilling else 0
            return self

        return launch


def blocks_of(options):
    return tuple(options[name] for name in ("BLOCK_QUERIES", "BLOCK_KEYS", "num_warps", "num_stages"))


def jobs_of_a_fake(monkeypatch, **kernel):
    fake = Kernel()
    monkeypatch.setattr(forward, "attention_kernel", fake)
    monkeypatch.setattr(forward, "architecture_of", lambda _: "sm_90")
    jobs = tune.make_jobs("plain", 64, "bfloat16", tune.Shapes((1, 2, 5), (1, 1, 1, 1)), "cpu", ["attention"])
    vars(fake).update(kernel)
    return fake, jobs


@pytest.fixture
def tried(monkeypatch):
    """Tune attention with a fake kernel. `times` has the time of each config, or one for each measurement."""

    def run(times, minutes=5.0, failing_to_compile=(), measure=None, **kernel):
        fake, jobs = jobs_of_a_fake(monkeypatch, **kernel)
        seen = {}

        def timed(call):
            call()
            blocks = fake.ran[-1]
            of = times.get(blocks, 100.0)
            seen[blocks] = seen.get(blocks, -1) + 1
            return of[min(seen[blocks], len(of) - 1)] if isinstance(of, tuple) else of

        def compiled(launch):
            if blocks_of(launch.options) in failing_to_compile:
                raise ValueError("cannot be compiled")

        gpu = GpuFunctions(measure or timed, compiled, lambda: None)
        deadline = time.monotonic() + minutes * 60
        rows = tune.tune(jobs, "sm_90", "bfloat16", 64, gpu, deadline, {"attention": BLOCKS})
        return {tuple(row["config"][n] for n in NUMBERS): row for row in rows}

    return run


NUMBERS = ("block_queries", "block_keys", "num_warps", "num_stages")


def winners(rows):
    return [blocks for blocks, row in rows.items() if row["winner"]]


def test_the_fastest_wins_and_the_tables_stay_as_they_are(tried):
    before = configs_tables.TABLES["sm_90"]
    rows = tried({(64, 64, 4, 2): 80.0, (64, 128, 4, 2): 70.0})
    assert winners(rows) == [(64, 128, 4, 2)]
    assert list(rows) == [IN_USE, *BLOCKS]
    assert rows[IN_USE]["default"]
    assert rows[IN_USE]["median_us"] == 100.0
    assert [row["status"] for row in rows.values()] == ["measured"] * 5
    assert configs_tables.TABLES["sm_90"] is before
    assert configs_attention.choose("attention", 64, torch.bfloat16, "sm_90").num_warps == 4


def test_an_architecture_without_a_table_still_has_none(tried):
    with tune_using("sm_89"):
        assert configs_attention.choose("attention", 64, torch.bfloat16, "sm_89").num_warps == 2
        assert configs_attention.choose("attention", 32, torch.bfloat16, "sm_89").num_warps == 4
        assert configs_attention.choose("attention", 64, torch.bfloat16, "sm_86").num_warps == 8
    assert "sm_89" not in configs_tables.TABLES


def tune_using(architecture):
    from benchmarks.harness.trials import use_config

    return use_config(architecture, "attention", "bfloat16", configs_tables.AttentionConfig(64, 64, 64, 2, 2))


def test_wrong_results_never_win(tried):
    rows = tried({(64, 64, 4, 2): 1.0, (64, 128, 4, 2): 2.0}, wrong=[(64, 64, 4, 2)], lazy=[(64, 128, 4, 2)])
    assert winners(rows) == []
    for blocks in BLOCKS[:2]:
        assert rows[blocks]["status"] == "wrong"
        assert rows[blocks]["median_us"] is None
    assert rows[BLOCKS[0]]["error"] == pytest.approx(0.1, rel=0.02)
    assert rows[BLOCKS[1]]["error"] != rows[BLOCKS[1]]["error"]  # NaN, the initial content of the output


def test_failures_are_recorded_and_the_others_are_timed(tried):
    rows = tried({BLOCKS[2]: 50.0}, failing=[BLOCKS[0]], failing_to_compile=[BLOCKS[1]])
    assert winners(rows) == [BLOCKS[2]]
    assert rows[BLOCKS[0]]["status"] == rows[BLOCKS[1]]["status"] == "failed"
    assert rows[BLOCKS[0]]["reason"] == "RuntimeError: out of resource: shared memory"
    assert rows[BLOCKS[1]]["reason"] == "ValueError: cannot be compiled"


def test_nothing_wins_if_the_config_in_use_fails(tried):
    rows = tried({BLOCKS[2]: 50.0}, failing=[IN_USE])
    assert winners(rows) == []
    assert rows[IN_USE]["status"] == "failed"
    assert {row["status"] for blocks, row in rows.items() if blocks != IN_USE} == {"not reached"}


def test_a_config_that_spills_is_timed_but_does_not_win(tried):
    rows = tried({BLOCKS[0]: 50.0, BLOCKS[1]: 90.0}, spilling=[BLOCKS[0]])
    assert winners(rows) == [BLOCKS[1]]
    assert rows[BLOCKS[0]]["status"] == "spills"
    assert rows[BLOCKS[0]]["median_us"] == 50.0


@pytest.mark.parametrize("fastest", [98.0, (90.0, 99.0)], ids=["less than the margin", "once, and not again"])
def test_small_or_accidental_gains_do_not_win(tried, fastest):
    assert winners(tried({BLOCKS[0]: fastest})) == []


def test_the_time_limit_keeps_earlier_results(tried):
    begin = time.monotonic()

    def slow(call):
        call()
        time.sleep(0.25)
        return 1.0

    rows = tried({}, minutes=0.4 / 60, measure=slow)
    assert time.monotonic() - begin < 5
    statuses = [row["status"] for row in rows.values()]
    assert statuses[0] == "measured"
    assert statuses[-1] == "not reached"
    assert len(rows) == 1 + len(BLOCKS)
    assert winners(rows) == []


def test_configs_that_do_not_reach_the_kernel_are_not_timed(monkeypatch):
    _, jobs = jobs_of_a_fake(monkeypatch)
    monkeypatch.setattr(forward, "architecture_of", lambda _: "sm_80")
    gpu = GpuFunctions(lambda _: 1.0, lambda _: None, lambda: None)
    with pytest.raises(RuntimeError, match="was not launched with"):
        list(tune.tune(jobs, "sm_90", "bfloat16", 64, gpu, time.monotonic() + 60, {"attention": BLOCKS}))


def test_a_lost_device_is_not_a_bad_config(monkeypatch):
    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    _, jobs = jobs_of_a_fake(monkeypatch, failing=[IN_USE])
    with pytest.raises(RuntimeError, match="illegal memory"):
        list(tune.tune(jobs, "sm_90", "bfloat16", 64, GpuFunctions(None, lambda _: None, lost), time.monotonic() + 60))


def test_rows_come_before_the_exception_of_their_kernel(monkeypatch):
    def synchronise():
        if made:
            raise RuntimeError("an illegal memory access was encountered")

    def timed(call):
        made.append(call())
        return 1.0

    made = []
    _, jobs = jobs_of_a_fake(monkeypatch)
    trying = tune.tune(
        jobs, "sm_90", "bfloat16", 64, GpuFunctions(timed, lambda _: None, synchronise), time.monotonic() + 60
    )
    assert next(trying)["status"] == "measured"
    with pytest.raises(RuntimeError, match="illegal memory"):
        list(trying)


def test_nothing_is_timed_while_others_compile(tried, monkeypatch):
    done = []
    monkeypatch.setattr(trials.Trial, "_compile", lambda self, launches: (time.sleep(0.02), done.append(launches)))
    counts = []

    def timed(call):
        call()
        counts.append(len(done))
        return 1.0

    tried({}, measure=timed)
    assert set(counts) == {1 + len(BLOCKS)}


def test_errors_are_relative_and_nan_never_passes():
    ones = torch.ones(4)
    assert relative_error([ones], [ones]) == 0
    assert relative_error([ones, ones * 3], [ones, ones * 2]) == pytest.approx(0.5)
    assert relative_error([ones * float("nan"), ones], [ones, ones]) != 0.0
    assert not relative_error([ones * float("nan"), ones], [ones, ones]) <= 1.0
    assert relative_error([ones], [ones * 0]) == float("inf")
    assert relative_error([ones[:0]], [ones[:0]]) == 0


def test_winners_are_added_to_the_file(tried, tmp_path):
    rows = list(tried({BLOCKS[0]: 50.0}).values())
    found = tune.winning(rows)
    assert found == {PLACE: configs_tables.AttentionConfig(64, 64, 64, 4, 2)}
    other = {PLACE._replace(kernel="gather+few"): configs_tables.AttentionConfig(64, 32, 64, 4, 3, enough=768)}
    path = tmp_path / "tuned.json"
    configs_tuned.write(path, other | found)
    assert configs_tuned.read(path) == other | found
    tables = dict(configs_tables.TABLES)
    tables["sm_90"] = {of: dict(by_width) for of, by_width in tables["sm_90"].items()}
    configs_tuned.apply(configs_tuned.read(path), tables)
    assert tables["sm_90"]["attention", torch.bfloat16][64] == found[PLACE]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Fake a GPU, on which every config after the first takes half the time."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.machine, "describe", lambda: MACHINE)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(configs_attention, "gpu_architecture", lambda _: "sm_90")
    fake, made = jobs_of_a_fake(monkeypatch)

    def measure(call):
        call()
        return 100.0 if fake.ran[-1] == IN_USE else 50.0

    monkeypatch.setattr(tune, "gpu_functions", lambda: GpuFunctions(measure, lambda _: None, lambda: None))
    monkeypatch.setattr(tune, "make_jobs", lambda *_: made)


MACHINE = {
    **{"date": "2026-01-02T03:04:05+00:00", "gpu": "a GPU", "torch": "2", "triton": "3", "commit": None},
    **{"dirty": False, "driver": None, "threads": 1, "cpu": "a CPU"},
}


def test_all_rows_are_recorded_and_the_readme_does_not_show_them(on_a_gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    tuned = tmp_path / "elsewhere" / "tuned.json"
    tuned.parent.mkdir()
    assert tune.main(["--kernel", "attention", "--tuned", str(tuned)]) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.name == "2026-01-02-cuda-tune.json"
    rows = records.read_json(path)["rows"]
    assert len(rows) > 10
    assert configs_tuned.read(tuned) == tune.winning(rows)
    assert len(tune.winning(rows)) == 1
    assert table.newest(tmp_path, "cuda", "micro") is None
    assert ", wins" in capsys.readouterr().out


def test_rows_before_an_exception_are_kept(on_a_gpu, tmp_path, capsys, monkeypatch):
    (job,) = tune.make_jobs()
    broken = job._replace(call=lambda: 1 / 0)
    monkeypatch.setattr(tune, "make_jobs", lambda *_: [job, broken, job])
    path, tuned = tmp_path / "run.json", tmp_path / "tuned.json"
    assert tune.main(["--tuned", str(tuned), "--json", str(path)]) == 1
    assert "stopped: ZeroDivisionError" in capsys.readouterr().err
    run = records.read_json(path)
    assert run["settings"]["stopped"].startswith("ZeroDivisionError")
    assert len(run["rows"]) == 1 + len(set(tune.CANDIDATES["attention"]) - {IN_USE})
    assert configs_tuned.read(tuned).keys() == {PLACE}


def test_a_bad_tuned_file_is_an_error_before_the_first_measurement(on_a_gpu, tmp_path, capsys):
    tuned = tmp_path / "tuned.json"
    tuned.write_text("{}")
    with pytest.raises(SystemExit):
        tune.main(["--kernel", "attention", "--tuned", str(tuned), "--json", str(tmp_path / "run.json")])
    assert f"{tuned}: it must be of schema 1" in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()
    assert tuned.read_text() == "{}"


@pytest.mark.parametrize(
    "arguments,words",
    [
        ([], "tuning needs a GPU: torch sees no CUDA device here"),
        (["--kernel", "merge"], "--kernel must name some of attention"),
        (["--variant", ""], "--variant must name some of plain"),
        (["--minutes", "0"], "--minutes must be more than 0"),
    ],
)
def test_bad_arguments(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        tune.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


INTERPRETED = """
import json, time
from benchmarks import tune
from benchmarks.harness.trials import GpuFunctions
shapes = tune.Shapes((1, 1, 9), (1, 1, 65, 66), 3)
tune.ENOUGH = (2, 9)
gpu = GpuFunctions(lambda call: call() or 1.0, lambda launch: None, lambda: None)
for variant in tune.VARIANTS:
    jobs = tune.make_jobs(variant, 32, "float32", shapes, "cpu")
    few = dict.fromkeys((*tune.ATTENTION, *tune.LOOKUP), [(32, 32, 4, 1)])
    for row in tune.tune(jobs, "portable", "float32", 32, gpu, time.monotonic() + 200, few):
        print(json.dumps([row["kernel"], row["status"], row["config"]["block_queries"], row["config"]["enough"]]))
"""


@pytest.mark.slow
def test_every_kernel_can_be_tuned():
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('["')]
    assert {kernel for kernel, *_ in rows} == {
        *tune.ATTENTION,
        *tune.LOOKUP,
        *(f"{kernel}+policy" for kernel in tune.ATTENTION),
        *(f"{kernel}+few" for kernel in tune.LOOKUP),
    }
    assert {status for _, status, *_ in rows} == {"measured"}
    assert {enough for kernel, *_, enough in rows if kernel == "gather"} >= {2, 9}
