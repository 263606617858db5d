# SPDX-License-Identifier: MIT
"""Time the candidates for one op on a GPU, side by side, on the shapes of vision transformers."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tokred_kernels.backends.selfcheck.cases import timing_cases

CALLS = 10  # in one replay, so that it takes longer than an event resolves
ROUNDS = 7

Run = Callable[[], Any]


def prepare(op: str, call: Callable[[tuple[Any, ...]], Any], device: torch.device) -> dict[str, Run]:
    """Return, by shape, a function that runs the op CALLS times: the replay of a CUDA graph.

    A call that cannot be captured (the reference reads back from the device in some ops) runs as it is.
    """
    return {case.name: _repeated(call, _moved(case.arguments, device)) for case in timing_cases(op)}


def interleaved(runs: dict[str, dict[str, Run]]) -> dict[str, dict[str, float]]:
    """Return the median time of one call in microseconds, by backend and shape.

    The backends take turns, so that a change of the clock meets all of them.
    """
    shapes = {shape for by_shape in runs.values() for shape in by_shape}
    times: dict[str, dict[str, list[float]]] = {backend: {} for backend in runs}
    for shape in sorted(shapes):
        for _ in range(ROUNDS):
            for backend, by_shape in runs.items():
                times[backend].setdefault(shape, []).append(_elapsed(by_shape[shape]) / CALLS)
    return {
        backend: {shape: round(median(samples), 2) for shape, samples in by_shape.items()}
        for backend, by_shape in times.items()
    }


def _repeated(call: Callable[[tuple[Any, ...]], Any], arguments: tuple[Any, ...]) -> Run:
    def eagerly() -> None:
        for _ in range(CALLS):
            call(arguments)

    eagerly()  # compiles, and fills caches
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            eagerly()
    except RuntimeError:
        return eagerly
    return graph.replay


def _elapsed(run: Run) -> float:
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
