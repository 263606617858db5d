# SPDX-License-Identifier: MIT
"""Run the self-check in worker processes: a kernel that kills or blocks its process costs only its own verdict.

An illegal access leaves a CUDA context unusable, so nothing is checked in the user's process. A worker answers one task
at a time on its standard output; the supervisor gives each task a time limit, and replaces a worker that dies or hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tokred_kernels.backends.selfcheck.verdict import CRASHED, HUNG, PASSED, UNKNOWN, Verdict, Verdicts

ROOT = Path(__file__).resolve().parents[3]  # the folder that holds this copy of the package
# Not `-m`: the worker must find what this process finds, and nothing from its current folder.
WORKER = "import sys; sys.path[:] = {!r}; from tokred_kernels.backends.selfcheck import worker; worker.main()"
ANSWER = "tokred-selfcheck "  # starts a line that is an answer; imports and compilers may print others
START_LIMIT = 180.0  # seconds in which a worker must have imported torch and opened the device
KILL_LIMIT = 10.0  # seconds in which a killed process must be gone; one that the driver holds is left behind
MOST_STARTS = 2
STDERR_TAIL = 300  # characters
MOST_STDERR = 1 << 16  # bytes that are read to find them
TORCH = "torch"  # not a backend with kernels to check, but a candidate to time


class Task(NamedTuple):
    """One task of a worker: check an op on each of the backends, or, if `times`, time it on them in turns.

    `dtype` restricts a check to the cases whose name starts with it, so that an op can be split over several workers.
    """

    op: str
    backends: tuple[str, ...]
    times: bool = False
    dtype: str = ""


class Settings(NamedTuple):
    """Settings that all tasks share.

    `seconds` limits a task. `workers` of them check side by side; tasks that time run one by one.
    """

    device: str
    seconds: float
    workers: int
    deep: bool = False


Note = Callable[[Task, dict[str, Verdict]], None]
Tasks = queue.SimpleQueue


def run(
    tasks: Iterable[Task], settings: Settings, progress: Callable[[Task, str, Verdict], None], known: Verdicts
) -> Verdicts:
    """Check, then time, and return `known` with the new verdicts added.

    `progress` is called with the task, the backend and the verdict as each is found. Tasks that time come after all
    others, and take the backends that have passed by then.
    """
    found: Verdicts = {backend: dict(ops) for backend, ops in known.items()}
    record = threading.Lock()
    checks: Tasks[Task] = Tasks()
    timings = []
    parts: Counter[tuple[str, str]] = Counter()  # tasks that are left, by backend and op
    for task in tasks:
        if task.times:
            timings.append(task)
            continue
        checks.put(task)
        for backend in task.backends:
            parts[backend, task.op] += 1
            found.setdefault(backend, {})[task.op] = _UNFINISHED

    def note(task: Task, answer: dict[str, Verdict]) -> None:
        with record:
            for backend, verdict in answer.items():
                progress(task, backend, verdict)
                parts[backend, task.op] -= not task.times
                before = found.get(backend, {}).get(task.op, _UNFINISHED)
                if task.times:  # a failure of the timing itself says nothing about the kernel
                    counts = verdict.verdict != UNKNOWN
                else:  # it passes with its last part, and fails with any
                    counts = not verdict.is_passed or parts[backend, task.op] == 0
                    counts = counts and before in (_UNFINISHED, Verdict(PASSED))
                if counts:
                    found.setdefault(backend, {})[task.op] = verdict

    slow: Tasks[Task] = Tasks()
    workers = [_Worker(settings) for _ in range(max(1, min(settings.workers, checks.qsize())))]
    threads = [
        threading.Thread(target=_work, args=(worker, checks, note, slow if len(workers) > 1 else None), daemon=True)
        for worker in workers
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        _work(workers[0], slow, note, None)  # other work may have slowed these down: once more, one by one
        for task in timings:
            backends = (name for name in task.backends if name == TORCH or _has_passed(found.get(name, {}), task.op))
            checks.put(task._replace(backends=tuple(backends)))
        _work(workers[0], checks, note, None)
    finally:  # at a keyboard interrupt, too
        for worker in workers:
            worker.close()
    return found


_UNFINISHED = Verdict(UNKNOWN, "the check did not finish")


def _has_passed(verdicts: dict[str, Verdict], op: str) -> bool:
    return op in verdicts and verdicts[op].is_passed


def _work(worker: _Worker, tasks: Tasks[Task], note: Note, slow: Tasks[Task] | None) -> None:
    """Run tasks until none is left; those without a clear answer go to `slow`, if that is given."""
    while not worker.is_closed:
        try:
            task = tasks.get_nowait()
        except queue.Empty:
            return
        if not task.backends:
            continue
        cannot_start = worker.make_ready()
        if cannot_start is not None:
            note(task, dict.fromkeys(task.backends, Verdict(UNKNOWN, cannot_start)))
            continue
        try:
            answer = worker.run(task)
        except TimeoutError as error:
            answer = {worker.at or task.backends[0]: Verdict(HUNG, str(error))}
        except Exception as error:  # _Gone, or an answer that is none: the kernel is not trusted
            answer = {worker.at or task.backends[0]: Verdict(CRASHED, str(error))}
        if any(verdict.verdict in (HUNG, CRASHED) for verdict in answer.values()):
            worker.stop()
        if slow is not None and any(verdict.verdict in (HUNG, UNKNOWN) for verdict in answer.values()):
            slow.put(task)
        elif not worker.is_closed:
            note(task, answer)
            # What the worker could not answer because it died is for another.
            tasks.put(task._replace(backends=tuple(name for name in task.backends if name not in answer)))


class _Gone(Exception):
    """The worker ended; the message says how."""


class _Worker:
    """One worker process, started when it is needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[str] | None = None
        self._stderr: Any = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._cannot_start: str | None = None
        self.at = ""  # the backend that is running
        self.is_closed = False

    def make_ready(self) -> str | None:
        """Start the process unless it runs, at the second try if need be; return why it does not start, or None."""
        for _ in range(MOST_STARTS):
            if self.is_closed:
                return "the check was interrupted"
            if self._cannot_start is not None or (self._process is not None and self._process.poll() is None):
                break
            self.stop()
            try:
                self._start()
                return None
            except Exception as error:  # of the system, or of the worker's imports
                failure = f"the worker process did not start: {error}"
                self.stop()
        else:
            self._cannot_start = failure
        return self._cannot_start

    def run(self, task: Task) -> dict[str, Verdict]:
        """Return the verdict of the task by backend; raise _Gone or TimeoutError if there is none."""
        self.at = ""
        self._send(task._asdict())
        while True:
            answer = self._receive(self._settings.seconds)
            if "at" not in answer:
                return {backend: Verdict.from_json(value) for backend, value in answer.items()}
            self.at = answer["at"]

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_LIMIT)

    def close(self) -> None:
        """End the process, and start no other."""
        self.is_closed = True
        self.stop()

    def _start(self) -> None:
        environment = os.environ | {"TOKRED_SELFCHECK": "0", "TOKRED_BACKEND": "auto", "PYTHONSAFEPATH": "1"}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the last reference)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        command = [sys.executable, "-c", WORKER.format([*filter(None, sys.path), str(ROOT)])]
        process = subprocess.Popen(command, text=True, errors="replace", env=environment, **pipes)
        self._process = process
        if self.is_closed:  # between the first look and now
            self.stop()
            raise _Gone("the check was interrupted")
        self._lines = queue.Queue()
        threading.Thread(target=_read, args=(process, self._lines), daemon=True).start()
        self._send(self._settings._asdict())
        self._receive(START_LIMIT)

    def _send(self, message: dict[str, Any]) -> None:
        process = self._process
        try:
            if process is None:
                raise _Gone("the process was ended")
            print(json.dumps(message), file=process.stdin, flush=True)
        except OSError as error:
            raise _Gone(self._how_it_ended()) from error

    def _receive(self, seconds: float) -> Any:
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"not done after {seconds:g} s") from None
        if line is None:
            raise _Gone(self._how_it_ended())
        return json.loads(line)

    def _how_it_ended(self) -> str:
        process = self._process
        if process is None:
            return "the process was ended"
        status = process.wait()
        try:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        except ValueError:
            how = f"signal {-status}"
        self._stderr.seek(max(0, self._stderr.seek(0, os.SEEK_END) - MOST_STDERR))
        said = " ".join(self._stderr.read().decode(errors="replace").split())[-STDERR_TAIL:]
        return f"the process ended with {how}" + (f": {said}" if said else "")


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    """Pass on the answers among the lines of the worker's output, then None."""
    with process.stdout as output:  # type: ignore[union-attr]
        for line in output:
            if line.startswith(ANSWER):
                lines.put(line.removeprefix(ANSWER))
    lines.put(None)
