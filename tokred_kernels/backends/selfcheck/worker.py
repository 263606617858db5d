# SPDX-License-Identifier: MIT
"""The worker process of the self-check: reads tasks as lines of JSON on stdin, answers each with a line on stdout.

The supervisor starts it; see there.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import torch
from torch import Tensor

from tokred_kernels.backends.selfcheck import timing
from tokred_kernels.backends.selfcheck.cases import Case, cases, reference_call, sdpa_call
from tokred_kernels.backends.selfcheck.memory import Guarded
from tokred_kernels.backends.selfcheck.supervisor import ANSWER
from tokred_kernels.backends.selfcheck.verdict import CRASHED, PASSED, UNKNOWN, WRONG, Verdict
from tokred_kernels.backends.support import implementation
from tokred_kernels.backends.triton.availability import triton_interprets

# For each run, the byte that fills new memory and that of the guard bands. As floats they are NaN, 1e36 and a moderate
# number: a maximum can hide NaN, and a factor of 0 hides a number. Results must not depend on them.
POISONS = ((0xFF, 0x7B), (0x7B, 0xFF), (0x5A, 0xA5))
POISONS_INTERPRETED = POISONS[:2]
GRACE = 60.0  # seconds
# Parts of messages that say that the device is short of something, not that a kernel is wrong.
SHORTAGES = ("out of memory", "busy or unavailable", "devices are busy", "can't allocate memory")

Call = Callable[[tuple[Any, ...]], tuple[Tensor, ...]]


def main() -> None:
    """Answer tasks until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what kernels and compilers print must not reach the answers
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    settings = json.loads(sys.stdin.readline())
    device = torch.device(settings["device"])
    torch.set_num_threads(1 if device.type == "cuda" else 2)  # 2, so that the work of a C++ kernel is split
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.synchronize()
    _answer(answers, {})
    for line in sys.stdin:
        task = json.loads(line)
        # Ends this process even if C code holds the interpreter's lock, after the supervisor would have done so.
        faulthandler.dump_traceback_later(settings["seconds"] + GRACE, exit=True)
        found: dict[str, Verdict] = {}
        runs: dict[str, dict[str, timing.Run]] = {}
        inputs = timing.inputs(task["op"], device) if task["times"] else {}
        for backend in task["backends"]:
            _answer(answers, {"at": backend})
            try:
                if task["times"]:
                    runs[backend] = timing.prepare(_call(backend, task["op"]), inputs)
                    found[backend] = Verdict(PASSED)
                else:
                    found[backend] = check(backend, task["op"], device, settings["deep"], task["dtype"])
            except Exception as error:  # from a kernel, its launch, its compiler or its import: this is the result
                found[backend] = failure(error)
            _end_if_lost(device)
        for backend, times in timing.interleaved(runs).items():
            found[backend].times_us = times
        _answer(answers, {backend: vars(verdict) for backend, verdict in found.items()})


def check(backend: str, op: str, device: torch.device, deep: bool = False, dtype: str = "") -> Verdict:
    """Run the cases of `op` on `backend`: all, or those whose name starts with `dtype`."""
    call = _call(backend, op)
    number = 0
    poisons = POISONS_INTERPRETED if triton_interprets() else POISONS
    for case in cases(op, interpreted=backend == "triton" and triton_interprets(), deep=deep):
        if not case.name.startswith(dtype):
            continue
        fault = check_case(case, call, device, poisons, captures=backend != "reference")
        if fault is not None:
            return Verdict(WRONG, f"{case.name}: {fault}")
        number += 1
    if device.type == "cuda":  # what the timing will compile, while others compile too
        timing.compile_inputs(call, timing.inputs(op, device, dtype))
    return Verdict(PASSED) if number else Verdict(UNKNOWN, f"the self-check lacks cases for {op}")


def check_case(
    case: Case, call: Call, device: torch.device, poisons: Sequence[tuple[int, int]], captures: bool
) -> str | None:
    """Run a case several times, in guarded memory, and return what is wrong with the results, or None."""
    ways = [("", _plainly, poison) for poison in poisons]
    if device.type == "cuda":
        ways[-1] = (" on a side stream", _on_a_side_stream, poisons[-1])
        if captures:
            ways.append((" in a CUDA graph", _in_a_graph, poisons[0]))
    first: tuple[Tensor, ...] | None = None
    for name, way, poison in ways:
        with Guarded(device, *poison) as guarded:
            results = way(call, guarded.place(case.arguments))
            fault = guarded.fault()
            outputs = tuple(result.cpu() for result in results)
        if fault is not None:
            return fault
        if first is None:
            first, fault = outputs, case.check(outputs)
        elif not all(map(_same_bits, first, outputs)):
            fault = f"not the same result again{name}"
        if fault is not None:
            return fault
    return None


def failure(error: Exception) -> Verdict:
    """Return what an exception says about a kernel."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(s in text.lower() for s in SHORTAGES):
        return Verdict(UNKNOWN, text)
    return Verdict(CRASHED, text)


def _call(backend: str, op: str) -> Call:
    if backend == "torch":
        return lambda arguments: sdpa_call(op, arguments)
    if backend == "reference":
        return lambda arguments: reference_call(op, arguments)
    function = implementation(backend, op)

    def call(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
        results = function(*arguments)
        return results if isinstance(results, tuple) else (results,)

    return call


def _plainly(call: Call, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return call(arguments)


def _on_a_side_stream(call: Call, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = call(arguments)
    torch.cuda.synchronize()
    return results


def _in_a_graph(call: Call, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(arguments)
    for _ in range(2):  # the second time finds what the first has left behind
        graph.replay()
    torch.cuda.synchronize()
    return results


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def _end_if_lost(device: torch.device) -> None:
    """End this process if it cannot use the device any more, as after an illegal access; the supervisor sees it."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)  # an orderly end would wait for the device


def _end_with_parent(parent: int) -> None:
    """End this process when its supervisor is gone, even while a kernel runs."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    print(ANSWER + json.dumps(message), file=answers, flush=True)
