# SPDX-License-Identifier: MIT
"""Clocks and statistics: providers take turns in rounds (A B C, A B C, ...), and ratios are taken inside a round.

A drift of the machine (heat, other work) then meets all providers alike and falls out of the ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[int], Any]  # runs on input set i
Visit = Callable[[], float]  # one turn of a provider: seconds a call

WARMUP_CALLS = 2
LEAST_ROUNDS = 5
MAX_SETS = 64  # input sets to rotate among on a GPU: enough, or so small that nothing could keep the cache cold
MAX_INNER = 10_000


class Budget(NamedTuple):
    """How long to measure: rounds, the least time a turn takes, and after how long a case gets no further round."""

    rounds: int
    turn_seconds: float
    case_seconds: float


FULL = Budget(rounds=60, turn_seconds=5e-3, case_seconds=20)
FULL_GPU = Budget(rounds=30, turn_seconds=5e-3, case_seconds=8)  # machines with one are lent for minutes
QUICK = Budget(rounds=15, turn_seconds=2e-3, case_seconds=4)


class Summary(NamedTuple):
    """The median, and the 20% and 80% quantiles."""

    median: float
    low: float
    high: float


def summarise(values: Sequence[float]) -> Summary:
    """Median and quantiles of the rounds."""
    return Summary(statistics.median(values), quantile(values, 0.2), quantile(values, 0.8))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """The median over rounds of slower / faster, each round by itself."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def interleave(visits: Mapping[str, Visit], budget: Budget) -> dict[str, list[float]]:
    """Seconds a call, by provider and round; as many rounds for each."""
    for visit in visits.values():
        visit()  # the first turn pays for what was not yet paged in
    seconds: dict[str, list[float]] = {name: [] for name in visits}
    start = time.perf_counter()
    for done in range(budget.rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > budget.case_seconds:
            break
        for name, visit in visits.items():
            seconds[name].append(visit())
    return seconds


def wall_visit(call: Call, sets: int, turn_seconds: float, synchronise: bool = False) -> Visit:
    """Turns by the host's clock: on the CPU, the work; on a GPU, what issuing it costs the host."""
    for i in range(WARMUP_CALLS):
        call(i % sets)
    inner = max(_calls_for(turn_seconds, _wall(call, sets, WARMUP_CALLS, synchronise)), sets)
    return lambda: _wall(call, sets, inner, synchronise)


def event_visit(call: Call, sets: int, turn_seconds: float) -> Visit:
    """Turns between two CUDA events: GPU time plus whatever gaps the host leaves, as an eager caller meets it."""
    for i in range(max(WARMUP_CALLS, sets)):
        call(i % sets)
    kept: list[Any] = [None] * sets  # holding the outputs keeps the allocator from giving the same, cached, block again

    def turn(inner: int) -> float:
        def work() -> None:
            for i in range(inner):
                kept[i % sets] = call(i % sets)

        return _between_events(work) / inner

    inner = max(_calls_for(turn_seconds, turn(sets)), sets)
    return lambda: turn(inner)


def graph_visit(call: Call, sets: int, turn_seconds: float) -> Visit:
    """Turns of a replayed CUDA graph that calls once on each input set: GPU time, without the host.

    Raises:
        RuntimeError: the call cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(max(WARMUP_CALLS, sets)):
            call(i % sets)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i) for i in range(sets)]  # alive to the end, so that each set writes memory of its own

    def turn(replays: int) -> float:
        def work() -> None:
            for _ in range(replays):
                graph.replay()

        return _between_events(work) / (replays * sets)

    turn(WARMUP_CALLS)
    replays = _calls_for(turn_seconds, turn(WARMUP_CALLS) * sets)

    def visit() -> float:
        _ = kept
        return turn(replays)

    return visit


def sets_past_cache(bytes_a_set: int, device: str) -> int:
    """How many input sets to rotate among so that none is still in the GPU's L2 when its turn comes; 1 on the CPU.

    The CPU is measured with its caches warm: a layer's tokens were written just before.
    """
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(MAX_SETS, 2 + 2 * cache // max(bytes_a_set, 1))


def _wall(call: Call, sets: int, inner: int, synchronise: bool) -> float:
    if synchronise:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(inner):
        call(i % sets)
    seconds = time.perf_counter() - start
    if synchronise:
        torch.cuda.synchronize()
    return seconds / inner


def _between_events(work: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3  # it counts milliseconds


def _calls_for(seconds: float, one: float) -> int:
    return max(1, min(MAX_INNER, round(seconds / max(one, 1e-9))))
