# SPDX-License-Identifier: MIT
"""Estimates, without a GPU, how long the self-check takes at the first use on one.

python benchmarks/selfcheck_cost.py --json docs/selfcheck_cost.json

It measures the start of a worker; the checks of all cases with the C++ kernels; the compilation of every Triton kernel
that the cases need, for sm_90, with a driver that compiles and does not launch; and building the inputs of the timings.
From these it computes the time of each task, and schedules the tasks on the workers as the supervisor does. The time on
the GPU itself is not included: some launches for each case, and a few milliseconds for each timed call.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if not __package__:  # run as a file
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import machine
from tokred_kernels.backends import support
from tokred_kernels.backends.selfcheck import DTYPES, MOST_WORKERS, supervisor, timing, worker
from tokred_kernels.backends.selfcheck.cases import cases, timing_cases
from tokred_kernels.backends.selfcheck.memory import Guarded
from tokred_kernels.files import replace_json
from tokred_kernels.ops.registry import OPS, SPECS

CPU = torch.device("cpu")
ARCHITECTURE = 90
# On a GPU, a case runs once more than on the CPU: in a CUDA graph.
GPU_RUNS = (len(worker.POISONS) + 1) / len(worker.POISONS)


def compiling_driver() -> Any:
    """Return a driver for Triton that compiles for a GPU and launches nothing."""
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    facts = {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024),  # module, function, registers, spills, threads
        get_device_properties=lambda device: facts,
    )
    return SimpleNamespace(
        binary_ext="cubin",
        utils=utils,
        launcher_cls=lambda *_: lambda *_, **__: None,
        get_current_target=lambda: GPUTarget("cuda", ARCHITECTURE, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: CPU,
    )


def start_seconds() -> float:
    """Return the median time until a worker is ready."""
    times = []
    for _ in range(3):
        process = supervisor._Worker(supervisor.Settings("cpu", 60, 1))
        begin = time.monotonic()
        process.make_ready()
        times.append(time.monotonic() - begin)
        process.close()
    return statistics.median(times)


def core_seconds() -> float:
    """Return the CPU time of this process and its children, which other work on the machine hardly affects."""
    return sum(os.times()[:4])


def check_seconds(op: str) -> float:
    """Return the time of the cases of an op with its C++ kernel."""
    begin = core_seconds()
    assert worker.check("cpu", op, CPU).is_passed
    return core_seconds() - begin


def inputs_seconds(op: str) -> float:
    """Return the time to build the inputs of an op's timing; one worker does so after the checks."""
    begin = core_seconds()
    timing.inputs(op, CPU)
    return core_seconds() - begin


def compile_seconds() -> dict[str, dict[str, Any]]:
    """Return the number and time of Triton's compilations for the cases, by op and dtype, with an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--compile"]
        environment = {**os.environ, "TRITON_CACHE_DIR": folder, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
        return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def compile_all() -> dict[str, dict[str, Any]]:
    from triton.runtime import driver, jit  # noqa: PLC0415

    driver.set_active(compiling_driver())
    spent: list[float] = []
    compile_one = jit.JITFunction._do_compile

    def timed(*arguments: Any, **settings: Any) -> Any:
        begin = core_seconds()
        result = compile_one(*arguments, **settings)
        spent.append(core_seconds() - begin)
        return result

    jit.JITFunction._do_compile = timed
    found: dict[str, dict[str, Any]] = {}
    for op in OPS:
        function, by_dtype = support.implementation("triton", op), {}
        for dtype in DTYPES if not SPECS[op].is_integer else ("",):
            spent.clear()
            for case in (*cases(op), *timing_cases(op)):
                if case.name.startswith(dtype):
                    with Guarded(CPU, poison=0, band=0) as guarded:  # nothing runs: new memory must hold valid indices
                        function(*guarded.place(case.arguments))
            by_dtype[dtype] = {"kernels": len(spent), "seconds": round(sum(spent), 2)}
        found[op] = by_dtype
        print(f"{op}: {by_dtype}", file=sys.stderr, flush=True)
    return found


def makespan(tasks: list[float], workers: int) -> float:
    """Return when the last worker is done, if each takes the next task when it is free."""
    free = [0.0] * workers
    for seconds in tasks:
        heapq.heappush(free, heapq.heappop(free) + seconds)
    return max(free)


def estimated(parts: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the seconds of a first use by number of workers, from the measured parts."""
    checks, ops = parts["checks"], [op for op in OPS if SPECS[op].family != "lookup"]  # these have a separate check
    serial = parts["start"] + sum(parts["inputs"][op] for op in ops)
    by_triton = {
        op: [part["seconds"] + checks[op] / len(by_dtype) for part in by_dtype.values()]
        for op, by_dtype in parts["compilations"].items()
    }
    by_cuda = [checks[op] for op in ops if "cuda" in SPECS[op].backends]
    reference = [checks[op] for op in ops]
    # The supervisor starts with the longest tasks.
    by_length = sorted(ops, key=lambda op: (SPECS[op].is_matrix_product, op.endswith("_backward")), reverse=True)
    alone = [seconds for op in by_length for seconds in by_triton[op]]
    with_cuda = [seconds for op in by_length if SPECS[op].is_matrix_product for seconds in by_triton[op]]
    return {
        f"{workers} workers": {
            "CUDA build": round(serial + makespan([*with_cuda, *by_cuda, *reference], workers), 1),
            "Triton alone": round(serial + makespan([*alone, *reference], workers), 1),
        }
        for workers in (2, 4, MOST_WORKERS)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="record the parts and the estimates there")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        print(json.dumps(compile_all()))
        return
    torch.set_num_threads(1)
    start = start_seconds()
    checks = {op: check_seconds(op) * GPU_RUNS for op in OPS}
    parts = {
        "start": start,
        "inputs": {op: inputs_seconds(op) for op in OPS},
        "checks": checks,
        "compilations": compile_seconds(),
    }
    estimates = estimated(parts)
    kernels = sum(part["kernels"] for by_dtype in parts["compilations"].values() for part in by_dtype.values())
    print(f"{kernels} Triton kernels; seconds at the first use: {json.dumps(estimates, indent=1)}")
    if options.json:
        replace_json(options.json, {"machine": machine.describe(), "seconds": parts, "estimates": estimates})


if __name__ == "__main__":
    main()
