# SPDX-License-Identifier: MIT
"""Peak memory of a call on the CPU, whoever takes it: torch, BLAS or C++ code, for a while or for good.

A fresh process makes the call, for what earlier ones took and kept would otherwise not be seen. What stays taken after
the first call is counted, and what the second one takes at its height beyond that; code that is paged in is not.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import torch

if not __package__:  # run as a file: the folder above holds this package, and comes after what is installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import Case
from benchmarks.inputs import draw
from benchmarks.providers import Provider, providers

MEMORY = "resident memory of a process of its own, outputs included and inputs not"
STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # the peak becomes what is resident now; Linux, proc_pid_clear_refs(5)
SEED = 7


def peak_bytes(case: Case, provider: Provider) -> int | None:
    """The most bytes that a call of the provider holds at a time; None where the system does not tell.

    Raises:
        RuntimeError: the call failed in a process of its own.
    """
    if not RESET.exists():
        return None
    values = dataclasses.asdict(case) | {"targets": ()}
    request = {"case": values, "provider": provider.name, "threads": torch.get_num_threads()}
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {provider.name}: {done.stderr.strip()}")
    return json.loads(done.stdout)


def main() -> None:
    request = json.loads(sys.argv[1])
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in request["case"].items()}
    torch.set_num_threads(request["threads"])
    print(json.dumps(_measure(Case(**values), request["provider"])))


def _measure(case: Case, name: str) -> int | None:
    provider = _provider(case, name)
    inputs = draw(case, SEED)
    small = _small(case)
    with provider.scope(case.training):
        _provider(small, name).run(draw(small, SEED))  # libraries load, threads start
        _give_back()
        before = _status("RssAnon")
        provider.run(inputs)
        _give_back()
        kept = max(_status("RssAnon") - before, 0)
        try:
            RESET.write_text(RESET_PEAK)
        except OSError:
            return None
        before = _status("VmRSS")
        output = provider.run(inputs)
        peak = _status("VmHWM")
        del output
    return kept + peak - before


def _provider(case: Case, name: str) -> Provider:
    return next(provider for provider in providers(case, [name], False) if provider.name == name)


def _small(case: Case) -> Case:
    """The same op on two windows, or cells, a side."""
    height, width = case.window
    tokens = case.prefix + 4 * height * width
    return dataclasses.replace(case, shape=(1, tokens, case.shape[2]), r=1)


def _give_back() -> None:
    """Freed memory to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    """A field of the process's status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024  # it counts in kB


if __name__ == "__main__":
    main()
