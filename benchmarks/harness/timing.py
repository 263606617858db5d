# SPDX-License-Identifier: MIT
"""Clocks and statistics. Providers take turns in rounds (A B C, A B C, ...), and ratios are taken within a round.

So a drift of the machine, such as heat or other work, affects all providers equally and cancels in the ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[int], Any]  # runs on input set i
Visit = Callable[[], float]  # one turn of a provider; returns seconds per call

WARMUP_CALLS = 2
LEAST_ROUNDS = 5
MAX_SETS = 64
MAX_INNER = 10_000


class Budget(NamedTuple):
    """Number of rounds, shortest time of a turn, and the time after which a case starts no further round."""

    rounds: int
    turn_seconds: float
    case_seconds: float


FULL = Budget(rounds=60, turn_seconds=5e-3, case_seconds=20)
FULL_GPU = Budget(rounds=30, turn_seconds=5e-3, case_seconds=8)
QUICK = Budget(rounds=15, turn_seconds=2e-3, case_seconds=4)


class Summary(NamedTuple):
    """The median, and the 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float


def summarise(values: Sequence[float]) -> Summary:
    """Return median and quantiles of the rounds."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return Summary(*ordered * 3)
    fifths = statistics.quantiles(ordered, n=5, method="inclusive")
    return Summary(statistics.median(ordered), fifths[0], fifths[-1])


def ratio(slower: Sequence[float], faster: Sequence[float]) -> float:
    """Return the median over rounds of slower / faster."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def interleave(visits: Mapping[str, Visit], budget: Budget) -> dict[str, list[float]]:
    """Return seconds per call by provider and round, with the same number of rounds for each provider."""
    for visit in visits.values():
        visit()  # a warm-up: the first turn includes page faults
    seconds: dict[str, list[float]] = {name: [] for name in visits}
    start = time.perf_counter()
    for done in range(budget.rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > budget.case_seconds:
            break
        for name, visit in visits.items():
            seconds[name].append(visit())
    return seconds


def wall_visit(call: Call, sets: int, turn_seconds: float, synchronise: bool = False) -> Visit:
    """Return turns timed by the host's clock. With `synchronise`, they time what issuing GPU work costs the host."""

    def turn(inner: int) -> float:
        if synchronise:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(inner):
            call(i % sets)
        seconds = time.perf_counter() - start
        if synchronise:
            torch.cuda.synchronize()
        return seconds / inner

    turn(WARMUP_CALLS)
    inner = max(_calls_for(turn_seconds, turn(WARMUP_CALLS)), sets)
    return lambda: turn(inner)


def event_visit(call: Call, sets: int, turn_seconds: float) -> Visit:
    """Return turns between two CUDA events: GPU time plus the gaps that the host leaves, as in eager code."""
    kept: list[Any] = [None] * sets  # outputs stay alive, so that the allocator does not return a block still in cache

    def turn(inner: int) -> float:
        def work() -> None:
            for i in range(inner):
                kept[i % sets] = call(i % sets)

        return _between_events(work) / inner

    turn(max(WARMUP_CALLS, sets))
    inner = max(_calls_for(turn_seconds, turn(sets)), sets)
    return lambda: turn(inner)


def graph_visit(call: Call, sets: int, turn_seconds: float) -> Visit:
    """Return turns of a replayed CUDA graph with one call on each input set: GPU time without the host.

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
        kept = [call(i) for i in range(sets)]

    def turn(replays: int) -> float:
        def work() -> None:
            for _ in range(replays):
                graph.replay()

        return _between_events(work) / (replays * sets)

    turn(WARMUP_CALLS)
    replays = _calls_for(turn_seconds, turn(WARMUP_CALLS) * sets)

    def visit() -> float:
        _ = kept  # alive as long as the visit, so that each input set has its own output memory
        return turn(replays)

    return visit


def sets_past_cache(bytes_per_set: int, device: str) -> int:
    """Return how many input sets to rotate through, so that each has left the GPU's L2 cache before its next turn.

    On the CPU it is 1, with warm caches: in a model, the previous layer has just written the tokens.
    """
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return min(MAX_SETS, 2 + 2 * cache // max(bytes_per_set, 1))


def _between_events(work: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3  # from milliseconds


def _calls_for(seconds: float, one: float) -> int:
    return max(1, min(MAX_INNER, round(seconds / max(one, 1e-9))))
