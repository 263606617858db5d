# SPDX-License-Identifier: MIT
"""The self-check from end to end, on the CPU: command line, supervisor, worker, cases and cache."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tokred_kernels import backends
from tokred_kernels.backends import native, selfcheck
from tokred_kernels.backends.selfcheck import cache, supervisor
from tokred_kernels.backends.selfcheck.memory import Guarded
from tokred_kernels.backends.selfcheck.verdict import CRASHED, HUNG, PASSED, UNKNOWN, WRONG, Verdict

PACKAGE = Path(selfcheck.__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(native.MODULE is None, reason="the native module is not built")


def environment(folder, **more):
    """The environment of a run that imports the package in `folder`, and keeps its cache there."""
    names = {"PYTHONPATH": str(folder), "TOKRED_CACHE_DIR": str(folder / "cache")} | more
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | names


def command(folder, *arguments, cwd=None, **more):
    """Run `python -m tokred_kernels` with the package in `folder`."""
    run = [sys.executable, "-m", "tokred_kernels", *arguments]
    return subprocess.run(
        run, env=environment(folder, **more), capture_output=True, text=True, check=False, cwd=cwd or folder
    )


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, to be changed."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def plant(folder, op, before, after):
    """Change the C++ backend's adaptor for an op."""
    path = folder / PACKAGE.name / "backends" / "native" / f"{op}.py"
    source = path.read_text()
    assert source.count(before) == 1, f"{path} has changed"
    path.write_text(source.replace(before, after))


@pytest.mark.slow
def test_planted_faults_are_found_and_cost_no_other_op(copy):
    plant(copy, "merge", "    return y, sums", "    y.mul_(1.001)\n    return y, sums")
    outside = "x.as_strided((1,), (1,), x.storage_offset() + x.numel()).fill_(1)"
    plant(copy, "unmerge", "    return x", f"    {outside}\n    return x")
    plant(copy, "keep_topk", "    return dest", "    __import__('os').abort()\n    return dest")
    plant(copy, "compose", "    return dest", "    while True:\n        pass\n    return dest")
    plant(copy, "count_above_threshold", "from torch import Tensor", "from torch import Tensor, NoSuchThing")
    noise = "score.add_(__import__('torch').rand(score.shape) * 1e-7)"
    plant(copy, "window_similarity", "    return score", f"    {noise}\n    return score")
    arguments = "check", "--device", "cpu", "--backend", "cpu", "--json"
    run = command(copy, *arguments, TOKRED_SELFCHECK_TIMEOUT="20")
    assert run.returncode == 1, run.stdout + run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found.keys() == {"cpu"} and found["cpu"].keys() == set(backends.OPS)
    faults = {
        "merge": (WRONG, "expected"),
        "unmerge": (WRONG, "wrote outside a tensor"),
        "keep_topk": (CRASHED, "SIGABRT"),
        "compose": (HUNG, "20 s"),
        "count_above_threshold": (CRASHED, "ImportError: cannot import name 'NoSuchThing'"),
        "window_similarity": (WRONG, "not the same result again"),
    }
    for op, verdict in found["cpu"].items():
        expected, words = faults.get(op, (PASSED, ""))
        assert verdict["verdict"] == expected, f"{op}: {verdict}"
        assert words in (verdict["reason"] or "") and verdict["times_us"] == {}


@pytest.mark.slow
def test_the_cpu_kernels_pass(tmp_path):
    start = time.monotonic()
    run = command(PACKAGE.parent, "check", "--device", "cpu", "--backend", "cpu", TOKRED_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(re.findall(r"^\w+ +cpu +passed$", run.stdout, re.MULTILINE)) == len(backends.OPS), run.stdout
    assert time.monotonic() - start < 60, "30 s on two idle cores; other tests run at the same time"


@pytest.mark.slow
@pytest.mark.skipif(backends.can_run("merge", "triton", "cuda", torch.float32) is not None, reason="no triton")
@pytest.mark.parametrize("op", ["merge", "bipartite_match"])
def test_triton_kernels_pass_in_the_interpreter(tmp_path, op):
    arguments = "check", "--device", "cpu", "--backend", "triton", "--op", op, "--json"
    run = command(PACKAGE.parent, *arguments, TOKRED_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "triton": {op: {"verdict": "passed", "reason": None, "times_us": {}}}
    }


def test_without_the_interpreter_triton_is_unsupported_on_the_cpu(tmp_path):
    arguments = "check", "--device", "cpu", "--backend", "triton", "--op", "merge"
    run = command(PACKAGE.parent, *arguments, TOKRED_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0 and "unsupported" in run.stdout and "TRITON_INTERPRET" in run.stdout


def test_the_worker_does_not_import_from_the_current_folder(tmp_path):
    (tmp_path / "json.py").write_text("raise RuntimeError('the wrong json')")
    arguments = "check", "--device", "cpu", "--backend", "cpu", "--op", "compose"
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); from tokred_kernels.__main__ import main; main()"
    run = subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments],
        env=environment(tmp_path / "nothing", TOKRED_CACHE_DIR=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert run.returncode == 0 and "wrong json" not in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize(
    "arguments,words",
    [
        (("check", "--op", "convolve"), "--op must be one of bipartite_match, .*, got 'convolve'"),
        (
            ("check", "--device", "cpu", "--backend", "metal"),
            "--backend must be one of cpu, triton on cpu, got 'metal'",
        ),
        (("check", "--device", "cpu", "--backend", "cuda"), "--backend must be one of cpu, triton on cpu, got 'cuda'"),
        (("check", "--device", "gpu"), """--device must be "cpu", "cuda" or "cuda:INDEX", got 'gpu'"""),
        (("check", "--device", "meta"), """--device must be "cpu", "cuda" or "cuda:INDEX", got 'meta'"""),
        (("check", "--device", "cuda:99"), "--device cuda:99: torch finds [0-9]+ GPUs? here"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, words, capsys):
    from tokred_kernels.__main__ import main

    with pytest.raises(SystemExit) as status:
        main(list(arguments))
    error = capsys.readouterr().err.splitlines()[-1]
    assert status.value.code == 2
    assert re.search(words, error), error


@pytest.mark.parametrize(
    "name,value,words",
    [
        ("TOKRED_CACHE_DIR", "{file}", "the cache folder .*file is a file; set TOKRED_CACHE_DIR to a folder"),
        ("TOKRED_SELFCHECK_TIMEOUT", "soon", "must be a number of seconds above 0, got 'soon'"),
        ("TOKRED_SELFCHECK_TIMEOUT", "inf", "must be a number of seconds above 0, got 'inf'"),
        ("TOKRED_SELFCHECK_TIMEOUT", "-1", "must be a number of seconds above 0, got '-1'"),
    ],
)
def test_bad_settings_are_named(name, value, words, monkeypatch, tmp_path, capsys):
    from tokred_kernels.__main__ import main

    (tmp_path / "file").write_text("kept")
    monkeypatch.setenv("TOKRED_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(name, value.format(file=tmp_path / "file"))
    with pytest.raises(SystemExit) as status:
        main(["check", "--device", "cpu", "--backend", "cpu", "--op", "merge"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert status.value.code == 2
    assert re.search(words, error), error
    assert (tmp_path / "file").read_text() == "kept"


def test_info_prints_what_each_op_uses(tmp_path):
    run = command(PACKAGE.parent, "info", TOKRED_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0
    assert "merge " in run.stdout and "auto -> cpu" in run.stdout
    assert not list(tmp_path.iterdir())  # it checks nothing


def test_info_shows_verdicts_times_and_reasons():
    from tokred_kernels.backends.configuration import gpu_lines

    times = {"bfloat16 64x197x384": 7.5}
    found = {
        "cuda": {"merge": Verdict(WRONG, "float32 N=17: y[0] is 1.001, expected 1")},
        "triton": {"merge": Verdict(PASSED, None, times)},
        "reference": {"merge": Verdict(PASSED, None, {"bfloat16 64x197x384": 130})},
    }
    lines = gpu_lines(torch.device("cuda", 0), found)
    text = "\n".join(lines)
    if backends.can_run("merge", "triton", "cuda", torch.bfloat16) is None:
        assert "merge                     auto -> triton" in text
    assert "y[0] is 1.001" in text and "bfloat16 64x197x384 7.5 us" in text and "130 us" in text
    assert "python -m tokred_kernels check --device cuda:0" in gpu_lines(torch.device("cuda", 0), {})[0]


def test_importing_the_package_starts_nothing():
    code = """
import sys, threading
import torch
before = set(sys.modules)
import tokred_kernels
new = set(sys.modules) - before
assert not [name for name in new if "selfcheck.cases" in name or "selfcheck.worker" in name or name == "filelock"], new
assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in new), new
assert threading.active_count() == 1
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment(PACKAGE.parent), capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


# The automatic check, for a GPU in name only, whose kernels are those of the CPU.
AUTOMATIC = """
import sys, time
import torch
from tokred_kernels.backends import selfcheck
log, ready, go = sys.argv[1:]
cpu, real_facts, real_check = torch.device("cpu"), selfcheck.cache.facts, selfcheck.check
def check(device, kernels, known):
    open(log, "a").write("checked\\n")
    time.sleep(float(go))
    return real_check(cpu, [("cpu", "compose")], known=known)
selfcheck.check = check
selfcheck.due = lambda device, found, op: [] if found else [("cpu", "compose")]
selfcheck.cache.facts = lambda device: real_facts(cpu)
torch.cuda.is_current_stream_capturing = lambda: False
open(ready, "w").close()
print(selfcheck.verdicts(torch.device("cuda", 0))["cpu"]["compose"].verdict)
"""


def automatic(folder, name, seconds, **more):
    log, ready = folder / "log", folder / f"ready-{name}"
    process = subprocess.Popen(
        [sys.executable, "-c", AUTOMATIC, log, ready, str(seconds)],
        env=environment(PACKAGE.parent, TOKRED_CACHE_DIR=str(folder / "cache"), **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process, log, ready


def test_two_processes_run_one_check(tmp_path):
    started = [automatic(tmp_path, name, 2) for name in "ab"]
    outputs = [process.communicate(timeout=120) for process, *_ in started]
    assert [out for out, _ in outputs] == ["passed\n"] * 2, outputs
    assert (tmp_path / "log").read_text() == "checked\n"
    assert sum("waiting for another process" in said for _, said in outputs) == 1
    process, *_ = automatic(tmp_path, "c", 0)
    assert process.communicate(timeout=60) == ("passed\n", "")
    assert (tmp_path / "log").read_text() == "checked\n"


def test_a_killed_check_leaves_no_broken_cache(tmp_path):
    process, log, _ = automatic(tmp_path, "killed", 600)
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list((tmp_path / "cache").glob("*.json"))
    process, *_ = automatic(tmp_path, "next", 0)
    out, said = process.communicate(timeout=60)
    assert out == "passed\n", said
    assert log.read_text() == "checked\n" * 2


def test_a_home_that_cannot_be_written_works(tmp_path):
    log = tmp_path / "log"
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", AUTOMATIC, log, tmp_path / "ready", "0"],
            env=environment(PACKAGE.parent, TOKRED_CACHE_DIR="", HOME="/proc/nothing"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.stdout == "passed\n", run.stderr
        assert "cannot be written" in run.stderr
    assert log.read_text() == "checked\n" * 2


# The cache.

FACTS = {"device": "A GPU", "torch": "2.13", "triton": "3.6.0", "sources": "abc"}
FOUND = {"cuda": {"merge": Verdict(PASSED, None, {"bfloat16 8x197": 7.5}), "unmerge": Verdict(WRONG, "off by one")}}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKRED_CACHE_DIR", str(tmp_path / "a" / "b"))
    return tmp_path / "a" / "b"


def test_what_is_written_is_read(folder):
    assert cache.read(FACTS) == {} and not folder.exists()
    cache.write(FACTS, FOUND)
    assert cache.read(FACTS) == FOUND
    more = {"cuda": {"unmerge": Verdict(PASSED)}, "triton": {"merge": Verdict(UNKNOWN, "out of memory")}}
    cache.write(FACTS, more)  # adds to what is there; "unknown" is not kept
    assert cache.read(FACTS) == {"cuda": {"merge": FOUND["cuda"]["merge"], "unmerge": Verdict(PASSED)}, "triton": {}}
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("name", FACTS)
def test_other_facts_have_no_verdicts(folder, name):
    cache.write(FACTS, FOUND)
    assert cache.read(FACTS | {name: "other"}) == {}
    # Nor if the file of one has the name of another.
    (folder / f"{cache.key(FACTS)}.json").rename(folder / f"{cache.key(FACTS | {name: 'other'})}.json")
    assert cache.read(FACTS | {name: "other"}) == {}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"schema": 1}', "\xff\x00", "truncated", "verdict", "times"]
)
def test_a_file_that_is_broken_is_ignored(folder, content):
    cache.write(FACTS, FOUND)
    path = folder / f"{cache.key(FACTS)}.json"
    whole = path.read_text()
    changed = {
        "truncated": whole[: len(whole) // 2],
        "verdict": whole.replace('"passed"', '"fine"'),
        "times": whole.replace("7.5", '"fast"'),
        "nested": "[" * 200_000,
        "huge": whole.replace("7.5", "1" + "0" * 400),
    }
    path.write_text(changed.get(content, content), encoding="latin-1")
    assert cache.read(FACTS) == {}
    cache.write(FACTS, FOUND)
    assert cache.read(FACTS) == FOUND


def test_a_changed_kernel_or_triton_asks_for_a_new_check(monkeypatch, copy):
    monkeypatch.setattr(cache, "BACKENDS_FOLDER", copy / PACKAGE.name / "backends")

    def key():
        cache.sources.cache_clear()
        return cache.key(cache.facts(torch.device("cpu")))

    keys = [key(), key()]
    assert keys[0] == keys[1]
    (copy / PACKAGE.name / "backends" / "triton" / "merge.py").write_text("changed")
    keys.append(key())
    monkeypatch.setattr(cache, "triton_version", lambda: "99.0")
    keys.append(key())
    monkeypatch.setattr(torch, "__version__", "99.0")
    keys.append(key())
    assert len(set(keys)) == 4
    cache.sources.cache_clear()


# Parts.


def test_guards_see_writes_around_outputs_and_into_inputs():
    x = torch.randn(4, 6)[:, 1:5]
    for where in (-1, 12, 12 + 200):
        with Guarded(torch.device("cpu"), 0x5A, 0xA5) as guarded:
            y = guarded.place(x).new_empty(3, 4)
            assert guarded.fault() is None
            y.as_strided((1,), (1,), y.storage_offset() + where).fill_(0)
            assert "wrote outside a tensor of 48 bytes" in guarded.fault()
    with Guarded(torch.device("cpu"), 0x5A, 0xA5) as guarded:
        placed = guarded.place((x, 3, None))[0]
        assert torch.equal(placed, x) and placed.stride() == x.stride()
        placed[1, 1] = 7
        assert guarded.fault() == "wrote to an input"


def test_guards_keep_shapes_and_strides_and_poison():
    like = torch.randn(2, 3, 4).transpose(1, 2)
    plain = [torch.empty_like(like), like.new_empty(1, 5, 1), torch.empty((2, 0, 3)), like.new_empty((2,), dtype=int)]
    with Guarded(torch.device("cpu"), 0x5A, 0xA5):
        made = [
            torch.empty_like(like),
            like.new_empty(1, 5, 1),
            torch.empty((2, 0, 3)),
            like.new_empty((2,), dtype=int),
        ]
        zeros = like.new_zeros(3)
    for one, other in zip(plain, made, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
    assert (made[0] == made[0][0, 0, 0]).all() and (made[3] == 0x5A5A5A5A5A5A5A5A).all() and (zeros == 0).all()
    assert like.new_empty(4).untyped_storage().nbytes() == 16  # the functions are torch's again


def test_a_worker_that_does_not_start_leaves_all_unknown(monkeypatch):
    monkeypatch.setattr(supervisor, "WORKER", _Verbatim("raise SystemExit('no such device')"))
    settings = supervisor.Settings("cpu", 10, 2)
    tasks = [supervisor.Task(op, ("cpu",)) for op in ("merge", "unmerge", "compose")]
    found = supervisor.run(tasks, settings, lambda *_: None, {})
    for verdict in found["cpu"].values():
        assert verdict.verdict == UNKNOWN and "no such device" in verdict.reason


# A worker that answers by rule: dies at the second backend when timing, is slow on one op unless it is alone.
PRETENDED = """
import json, os, sys, time
def answer_with(message):
    print("tokred-selfcheck " + json.dumps(message), flush=True)
print("a line that is not an answer", flush=True)
answer_with(dict()), sys.stdin.readline()
for line in sys.stdin:
    task, answer = json.loads(line), dict()
    for backend in task["backends"]:
        answer_with(dict(at=backend))
        if task["times"] and backend == "triton" and task["op"] == "merge":
            os.abort()
        if task["op"] == "compose" and not os.path.exists({!r} + "/second"):
            open({!r} + "/second", "w").close()
            time.sleep(60)
        times = dict(shape=5.0) if task["times"] else dict()
        answer[backend] = dict(verdict="passed", reason=None, times_us=times)
    answer_with(answer)
"""


def test_the_supervisor_blames_who_was_running(monkeypatch, tmp_path):
    worker = _Verbatim(PRETENDED.replace("{!r}", repr(str(tmp_path))))
    monkeypatch.setattr(supervisor, "WORKER", worker)
    order = []
    checks = [supervisor.Task(op, (b,)) for b in ("cuda", "triton") for op in ("merge", "compose")]
    timings = [supervisor.Task(op, ("cuda", "triton", "torch"), times=True) for op in ("merge", "compose")]
    known = {"cuda": {"unmerge": Verdict(WRONG, "known")}}
    found = supervisor.run(
        [*timings, *checks],
        supervisor.Settings("cpu", 2, 2),
        lambda task, backend, _: order.append((backend, task.op)),
        known,
    )
    times = Verdict(PASSED, None, {"shape": 5.0})
    assert found["cuda"] == {"unmerge": known["cuda"]["unmerge"], "merge": times, "compose": times}
    assert found["triton"]["compose"] == found["torch"]["merge"] == times  # `compose` was slow once, not when alone
    assert found["triton"]["merge"].verdict == CRASHED and "SIGABRT" in found["triton"]["merge"].reason
    assert order.index(("torch", "merge")) > 3


class _Verbatim(str):
    def format(self, *_):
        return str(self)


GARBAGE = """
import json, sys
def answer_with(message):
    print("tokred-selfcheck " + message, flush=True)
answer_with("{}"), sys.stdin.readline()
for line in sys.stdin:
    task = json.loads(line)
    verdict = dict(verdict="passed", reason=None, times_us=dict())
    good = json.dumps({backend: verdict for backend in task["backends"]})
    unknown = good.replace("passed", "unknown")
    answer_with(unknown if task["times"] else "[garbage" if task["dtype"] == "bfloat16" else good)
"""


def test_an_answer_that_is_none_is_a_failure(monkeypatch):
    monkeypatch.setattr(supervisor, "WORKER", _Verbatim(GARBAGE))
    tasks = [supervisor.Task("merge", ("triton",), dtype=dtype) for dtype in ("float32", "bfloat16", "float16")]
    tasks += [supervisor.Task("unmerge", ("triton",)), supervisor.Task("unmerge", ("triton",), times=True)]
    found = supervisor.run(tasks, supervisor.Settings("cpu", 10, 2), lambda *_: None, {})
    assert found["triton"]["merge"].verdict == CRASHED
    # A timing that could not be done takes nothing away.
    assert found["triton"]["unmerge"].verdict == PASSED


def test_an_op_passes_only_with_all_its_parts(monkeypatch):
    monkeypatch.setattr(supervisor, "WORKER", _Verbatim("raise SystemExit(1)"))
    tasks = [supervisor.Task("merge", ("triton",), dtype=dtype) for dtype in ("float32", "bfloat16")]
    found = supervisor.run(tasks, supervisor.Settings("cpu", 10, 1), lambda *_: None, {})
    assert found["triton"]["merge"].verdict == UNKNOWN


def test_an_interrupted_check_leaves_no_process(monkeypatch):
    started = []
    start = subprocess.Popen
    monkeypatch.setattr(supervisor.subprocess, "Popen", lambda *a, **k: started.append(start(*a, **k)) or started[-1])
    monkeypatch.setattr(supervisor, "WORKER", _Verbatim("import time; time.sleep(60)"))
    monkeypatch.setattr(supervisor, "_work", _interrupted(supervisor._work))
    tasks = [supervisor.Task(op, ("cpu",)) for op in ("merge", "unmerge")]
    with pytest.raises(KeyboardInterrupt):
        supervisor.run(tasks, supervisor.Settings("cpu", 60, 1), lambda *_: None, {})
    time.sleep(0.5)
    assert started and all(process.wait(10) is not None for process in started)


def _interrupted(work):
    import threading

    def interrupted(worker, *others):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        threading.Timer(1.0, worker.close).start()  # the first process is starting by now
        work(worker, *others)

    return interrupted


def test_what_is_wrong_is_not_timed(monkeypatch):
    worker = _Verbatim(PRETENDED.replace("{!r}", "'/'"))
    monkeypatch.setattr(supervisor, "WORKER", worker)
    known = {"cuda": {"merge": Verdict(WRONG, "known")}, "reference": {"merge": Verdict(PASSED)}}
    task = supervisor.Task("merge", ("cuda", "reference"), times=True)
    found = supervisor.run([task], supervisor.Settings("cpu", 5, 1), lambda *_: None, known)
    assert found["cuda"]["merge"] == known["cuda"]["merge"] and found["reference"]["merge"].times_us == {"shape": 5.0}
