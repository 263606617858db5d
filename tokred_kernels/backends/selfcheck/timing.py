# SPDX-License-Identifier: MIT
"""Time the candidates for one op on a GPU, side by side, on the shapes of vision transformers."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred_kernels.backends.selfcheck.cases import timing_cases

MOST_CALLS = 10  # in one replay, so that it takes longer than an event resolves
LONGEST_REPLAY = 2e3  # microseconds
ROUNDS = 5


class Run(NamedTuple):
    """A function to time, which makes `calls` calls of an op."""

    function: Callable[[], Any]
    calls: int


def inputs(op: str, device: torch.device, dtype: str = "") -> dict[str, tuple[Any, ...]]:
    """Return the arguments of the timed calls on the device, by shape: all, or those whose name starts with `dtype`."""
    found = (case for case in timing_cases(op) if case.name.startswith(dtype))
    return {case.name: _moved(case.arguments, device) for case in found}


def compile_inputs(call: Callable[[tuple[Any, ...]], Any], arguments: dict[str, tuple[Any, ...]]) -> None:
    """Run each call once, so that its kernels are compiled and in Triton's cache."""
    for values in arguments.values():
        call(values)


def prepare(call: Callable[[tuple[Any, ...]], Any], arguments: dict[str, tuple[Any, ...]]) -> dict[str, Run]:
    """Return, by shape, what is timed: the replay of a CUDA graph of some calls.

    A call that cannot be captured (the reference reads back from the device in some ops) runs as it is.
    """
    return {name: _repeated(call, values) for name, values in arguments.items()}


def interleaved(runs: dict[str, dict[str, Run]]) -> dict[str, dict[str, float]]:
    """Return the median time of one call in microseconds, by backend and shape.

    Backends alternate, so that clock changes affect all equally.
    """
    shapes = {shape for by_shape in runs.values() for shape in by_shape}
    times: dict[str, dict[str, list[float]]] = {backend: {} for backend in runs}
    for shape in sorted(shapes):
        for _ in range(ROUNDS):
            for backend, by_shape in runs.items():
                times[backend].setdefault(shape, []).append(_elapsed(by_shape[shape].function) / by_shape[shape].calls)
    return {
        backend: {shape: round(median(samples), 2) for shape, samples in by_shape.items()}
        for backend, by_shape in times.items()
    }


def _repeated(call: Callable[[tuple[Any, ...]], Any], arguments: tuple[Any, ...]) -> Run:
    call(arguments)  # compiles, and fills caches
    calls = max(1, min(MOST_CALLS, int(LONGEST_REPLAY / _elapsed(lambda: call(arguments)))))

    def eagerly() -> None:
        for _ in range(calls):
            call(arguments)

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            eagerly()
    except RuntimeError:
        return Run(eagerly, calls)
    return Run(graph.replay, calls)


def _elapsed(run: Callable[[], Any]) -> float:
    """Return the time of `run` on the device, in microseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def _moved(value: Any, device: torch.device) -> Any:
    """Return `value` with the tensors in it on `device`, at the same strides."""
    if isinstance(value, Tensor):
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return moved.copy_(value)
    if isinstance(value, tuple):
        parts = [_moved(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
