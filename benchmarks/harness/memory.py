# SPDX-License-Identifier: MIT
"""Peak memory of a call.

`peak_bytes` counts the outputs and temporaries that torch allocates. On the CPU this misses memory that BLAS and C++
code allocate themselves; `resident_peak_bytes` counts that too, in a new process. Neither counts the inputs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.case import Case
from benchmarks.harness.providers import providers

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # makes the resident memory the new peak; see proc_pid_clear_refs(5)
SEED = 7


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Return the most bytes of torch's memory that one call holds at a time, without its inputs."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = call()
        torch.cuda.synchronize()
        del output
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        output = call()
        del output
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()  # negative when memory is freed
            peak = max(peak, held)
    return peak


def resident_peak_bytes(case: Case, provider: str) -> int | None:
    """Return the most bytes that one call of a provider holds at a time, or None if the system does not report it.

    A new process makes the call, because memory that earlier calls kept would hide its own.

    Raises:
        RuntimeError: the process failed.
    """
    if not RESET.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, case, provider, torch.get_num_threads()).result()


def _measure(case: Case, provider: str, threads: int) -> int | None:
    torch.set_num_threads(threads)
    small = dataclasses.replace(case, shape=(1, case.prefix + 4 * case.window[0] * case.window[1], case.shape[2]), r=1)
    warm, found = (
        next(p for p in providers(each, [provider], compile_baseline=False) if p.name == provider)
        for each in (small, case)
    )
    inputs = case.draw(SEED)
    with found.scope(case.training):
        warm.run(small.draw(SEED))  # loads libraries and starts threads
        _trim()
        before = _status("RssAnon")
        found.run(inputs)
        _trim()
        kept = max(_status("RssAnon") - before, 0)  # the first call keeps this for good
        try:
            RESET.write_text(RESET_PEAK)
        except OSError:
            return None
        before = _status("VmRSS")
        output = found.run(inputs)
        peak = _status("VmHWM")
        del output
    return kept + peak - before


def _trim() -> None:
    """Return freed memory to the system if the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024  # from kB
