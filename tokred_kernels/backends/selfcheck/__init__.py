# SPDX-License-Identifier: MIT
"""The self-check: which kernels give right results on this GPU, with this driver and these versions, and how fast.

`auto` runs a GPU kernel only if it passed. The check runs once for each GPU model and set of versions, in child
processes; its verdicts are cached in $TOKRED_CACHE_DIR, by default ~/.cache/tokred_kernels.

    verdict.py      the verdict on one op of one backend
    cases/          what is computed, and what is right
    memory.py       guard bands and poison around every tensor
    worker.py       the child process: runs the cases
    timing.py       times the candidates
    supervisor.py   starts workers, limits their time, and replaces those that crash
    cache.py        the file, its key and its lock
    known_bad.py    kernels that are not tried
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tokred_kernels.backends.selfcheck import cache, supervisor
from tokred_kernels.backends.selfcheck.known_bad import reason_known
from tokred_kernels.backends.selfcheck.supervisor import Settings, Task
from tokred_kernels.backends.selfcheck.verdict import UNSUPPORTED, Verdict, Verdicts
from tokred_kernels.backends.support import can_run
from tokred_kernels.backends.triton.availability import triton_interprets
from tokred_kernels.ops.registry import OPS, SPECS

COMMAND, INFO = "python -m tokred_kernels check", "python -m tokred_kernels info"
# The backends that a device's check covers. The reference runs anywhere, and is checked and timed on GPUs like kernels.
CHECKED = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "triton")}
DTYPES = ("float32", "float16", "bfloat16")
# Seconds for one task. Compiling the Triton kernels of attention takes a minute on a slow CPU core.
LIMIT, LIMIT_INTERPRETED = 120.0, 300.0
MOST_WORKERS = 8
WORKER_BYTES = 1 << 30  # of the GPU's memory: a CUDA context and the cases
ESTIMATE = "15 s to a minute"  # docs/gpu_verification.md has the parts

_known: dict[tuple[int, bool], Verdicts] = {}  # by GPU, and whether it includes the lookup ops
_lock = threading.Lock()
_is_fork = False


def _after_fork() -> None:
    global _is_fork, _lock
    _is_fork, _lock = True, threading.Lock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def verdicts(device: torch.device, op: str = "") -> Verdicts:
    """Return the verdicts for a GPU, by backend and op; run the self-check first if they are not known.

    The lookup ops are checked when `op` is one of them: few models have them, and their kernels compile for long.

    Verdicts come from this process's memory, then from the cache, then from a check. No check runs if
    TOKRED_SELFCHECK=0, in a forked process, or while the current stream is captured in a CUDA graph: what is not known
    then stays out of the result, and is not used.
    """
    key = _key(device, op)
    known = _known.get(key)
    if known is not None:
        return known
    with _lock:
        if key not in _known:
            if _is_fork:
                _warn("in a forked process")
                return _known.setdefault(key, {})
            device = torch.device("cuda", key[0])
            facts = cache.facts(device)
            found = cache.read(facts)
            if due(device, found, op):
                if torch.cuda.is_current_stream_capturing():
                    _warn("during CUDA graph capture")
                    return found  # not kept: a later call can check
                if not is_off():
                    found = _check_automatically(device, facts, op)
            _known[key] = found
    return _known[key]


def cached(device: torch.device) -> Verdicts:
    """Return what is known about a device without running anything."""
    found = cache.read(cache.facts(device))
    for key, known in _known.items():
        if key[0] == (device.index or 0):
            found = {backend: found.get(backend, {}) | known.get(backend, {}) for backend in {**found, **known}}
    return found


def is_known(device: torch.device, op: str) -> bool:
    """Return whether this process has the verdicts for a GPU that `op` needs."""
    return _key(device, op) in _known


def _key(device: torch.device, op: str) -> tuple[int, bool]:
    return torch.cuda.current_device() if device.index is None else device.index, _is_lookup(op)


def _is_lookup(op: str) -> bool:
    return op in SPECS and SPECS[op].family == "lookup"


def is_off() -> bool:
    """Return whether TOKRED_SELFCHECK=0 forbids the check."""
    return os.environ.get("TOKRED_SELFCHECK", "1") == "0"


def check(
    device: torch.device,
    kernels: Iterable[tuple[str, str]],
    progress: Callable[[Task, str, Verdict], None] = lambda *_: None,
    *,
    deep: bool = False,
    known: Verdicts | None = None,
) -> Verdicts:
    """Check kernels now, and time them if the device is a GPU.

    Args:
        device: a GPU; or the CPU, for the C++ kernels, and for Triton's in its interpreter.
        kernels: pairs of a backend and an op.
        progress: called with the task, the backend and the verdict as each is found.
        deep: run many more cases.
        known: verdicts found before.

    Returns:
        `known` with the new verdicts added, by backend and op.
    """
    found: Verdicts = {backend: dict(by_op) for backend, by_op in (known or {}).items()}
    facts = cache.facts(device)
    tasks = []
    for backend, op in kernels:
        reason = can_run(op, backend, device, torch.float32)
        reason = reason or reason_known(backend, op, facts["architecture"], facts["triton"])
        if reason is not None:
            found.setdefault(backend, {})[op] = Verdict(UNSUPPORTED, reason)
            progress(Task(op, (backend,)), backend, found[backend][op])
        elif backend == "triton" and not SPECS[op].is_integer:  # split: most of the time goes into compiling
            tasks += [Task(op, (backend,), dtype=dtype) for dtype in DTYPES]
        else:
            tasks.append(Task(op, (backend,)))
    tasks.sort(key=_takes_long, reverse=True)
    if device.type == "cuda":
        for op in dict.fromkeys(task.op for task in tasks):
            # SDPA with a bias is a candidate for token attention with sizes; it is PyTorch's, and is not checked.
            sdpa = ("torch",) if SPECS[op].family == "attention" else ()
            tasks.append(Task(op, (*CHECKED["cuda"], *sdpa), times=True))
    return supervisor.run(tasks, _settings(device, deep), progress, found)


def _takes_long(task: Task) -> tuple[bool, bool]:
    """Order tasks so that the longest start first: those that compile attention, gradients before the rest."""
    return task.backends == ("triton",) and SPECS[task.op].is_matrix_product, task.op.endswith("_backward")


def due(device: torch.device, found: Verdicts, op: str = "") -> list[tuple[str, str]]:
    """Return the pairs of backend and op that `auto` needs a verdict for to run `op`, apart from those in `found`.

    Compiling Triton kernels takes most of the time of a check. So for ops that CUDA does well, Triton is checked only
    if CUDA has no kernel, or a wrong one; `python -m tokred_kernels check` checks everything.
    """
    pairs = []
    names = [name for name in OPS if _is_lookup(name) == _is_lookup(op)]
    for name, backend in itertools.product(names, CHECKED["cuda"]):
        if name in found.get(backend, {}) or can_run(name, backend, device, torch.float32) is not None:
            continue
        by_cuda = found.get("cuda", {}).get(name)
        expected = can_run(name, "cuda", device, torch.float32) is None if by_cuda is None else by_cuda.is_passed
        if backend != "triton" or SPECS[name].is_matrix_product or not expected:
            pairs.append((backend, name))
    return pairs


def _check_automatically(device: torch.device, facts: dict[str, Any], op: str) -> Verdicts:
    """Check what the cache lacks, while other processes of this machine wait; without a cache, check everything."""
    try:
        with cache.lock(facts, lambda: _say(f"waiting for another process, which checks the kernels on {device}")):
            found = cache.read(facts)
            if due(device, found, op):
                found = _check_due(device, facts, found, op)
                cache.write(facts, found)
            return found
    except cache.Unusable as error:
        _say(f"{error}; the verdicts last as long as this process")
        return _check_due(device, facts, cache.read(facts), op)


def _check_due(device: torch.device, facts: dict[str, Any], found: Verdicts, op: str) -> Verdicts:
    which = "kernels of lookup attention" if _is_lookup(op) else "kernels"
    _say(
        f"checking the {which} on {facts['device']}, once for this GPU, driver and versions ({ESTIMATE}); "
        "set TOKRED_SELFCHECK=0 to skip the check and run the PyTorch reference"
    )
    known = found
    found = check(device, due(device, found, op), known=found)
    in_place_of_cuda = due(device, found, op)
    if in_place_of_cuda:
        found = check(device, in_place_of_cuda, known=found)
    new = [(b, op, v) for b, ops in found.items() for op, v in ops.items() if op not in known.get(b, {})]
    failed = [f"{op} on {backend} ({verdict.verdict})" for backend, op, verdict in new if not verdict.is_passed]
    if failed:
        _say(f"not used: {', '.join(failed)}; `{INFO}` prints the reasons and what runs instead")
    return found


def _say(text: str) -> None:
    print(f"tokred_kernels: {text}", file=sys.stderr, flush=True)


def _warn(when: str) -> None:
    warnings.warn(
        f"tokred_kernels: no self-check of the GPU kernels {when}; the PyTorch reference runs instead. "
        f"Run `{COMMAND}` before",
        stacklevel=3,
    )


def _settings(device: torch.device, deep: bool) -> Settings:
    interpreted = device.type == "cpu" and triton_interprets()
    named = os.environ.get("TOKRED_SELFCHECK_TIMEOUT")
    try:
        seconds = float(named) if named else LIMIT_INTERPRETED if interpreted else LIMIT
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"TOKRED_SELFCHECK_TIMEOUT must be a number of seconds above 0, got {named!r}")
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        workers = min(workers, free // WORKER_BYTES)
    return Settings(str(device), seconds, max(1, min(MOST_WORKERS, workers)), deep)
