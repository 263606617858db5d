# SPDX-License-Identifier: MIT
"""The micro suite: one op at one shape, all providers checked, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks import footprint, resident, traffic
from benchmarks.agreement import check
from benchmarks.cases import ADAPTIVE_OPS, Case, Target
from benchmarks.ceilings import Ceilings
from benchmarks.families import family
from benchmarks.inputs import Inputs, draw
from benchmarks.providers import CLONE, COMPILED, FUSED, PUBLISHED, REFERENCE, Failed, Provider, providers
from benchmarks.record import release, told
from benchmarks.timing import (
    Budget,
    Visit,
    event_visit,
    graph_visit,
    interleave,
    ratio,
    sets_past_cache,
    summarise,
    wall_visit,
)

SEED = 7
SLOTS_OF_THEIR_OWN = ("random_bipartite_match", "grid_bipartite_match")  # the published chain orders them otherwise


@dataclass(frozen=True)
class Settings:
    """The settings of a run, for all its cases."""

    budget: Budget
    backends: list[str]
    quick: bool
    failed: Failed = field(default_factory=dict)


def measure(
    case: Case, settings: Settings, ceilings: Ceilings
) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """A row for each provider of a case, and what those failed by that have none.

    A provider whose result is wrong, or that cannot run, is not timed; the others are.
    """
    compile_chain = case.quick_compile or not settings.quick
    competing = providers(case, settings.backends, compile_chain, settings.failed)
    lost: dict[str, dict[str, str]] = {}

    def each(step: Callable[[Provider], Any]) -> dict[str, Any]:
        """A step's result by provider, of those that have not failed yet."""
        results = {}
        for provider in competing:
            if provider.name not in lost:
                try:
                    results[provider.name] = step(provider)
                except Exception as error:  # of torch, a compiler, a driver; it is recorded
                    lost[provider.name] = told(error)
                if provider.name in lost:  # here the error and what it held are gone
                    release(case.device)
        return results

    first = draw(case, SEED)
    chosen = each(lambda provider: check(case, provider, first))
    sets = 1 if case.host else sets_past_cache(traffic.least_bytes(case), case.device)
    inputs = [first] + [draw(case, SEED + i) for i in range(1, sets)]
    peaks = _whole_peaks(case, [provider for provider in competing if provider.name not in lost])
    seconds: dict[str, dict[str, list[float]]] = {}
    for clock in _clocks(case):
        visits = each(lambda provider, clock=clock: _visit(case, provider, inputs, settings.budget, clock))
        seconds[clock] = interleave({name: visit for name, visit in visits.items() if visit}, settings.budget)

    def row(provider: Provider) -> dict[str, Any]:
        made = _row(case, provider, sets)
        baseline = chosen.get(PUBLISHED)
        if chosen[provider.name] is not None and baseline is not None and case.op not in SLOTS_OF_THEIR_OWN:
            made["tokens_unlike_published"] = int((chosen[provider.name] != baseline).sum())
        with provider.scope(case.training):
            made["launches"] = footprint.launches(lambda: provider.run(first)) if case.device == "cuda" else None
            made["peak_bytes"] = footprint.peak_bytes(lambda: provider.run(first), case.device)
        # The row stands for the last clock that could be used on its provider; the others are kept beside it.
        made["clocks"] = {c: _statistics(of, provider.name) for c, of in seconds.items() if provider.name in of}
        made["clock"] = list(made["clocks"])[-1]
        made |= made["clocks"][made["clock"]]
        _add_rates(made, case, ceilings)
        _add_peaks(made, case, peaks)
        ours = provider.backend not in (None, REFERENCE)
        made["targets"] = [judge(target, made) for target in case.targets] if ours else []
        return made

    return list(each(row).values()), lost


def judge(target: Target, row: dict[str, Any]) -> dict[str, Any]:
    """What a target asks, what the row has, and whether that is enough; None where the row lacks the measure."""
    value = row.get(target.measure)
    met = None if value is None else target.met(value)
    return {"target": str(target), "measure": target.measure, "bound": target.bound, "value": value, "met": met}


def _clocks(case: Case) -> tuple[str, ...]:
    if case.host or case.device == "cpu":
        return ("wall",)
    if case.op in ADAPTIVE_OPS:  # what is read back to the host on the way cannot be captured
        return ("events",)
    return ("events", "graph")


def _visit(case: Case, provider: Provider, inputs: list[Inputs], budget: Budget, clock: str) -> Visit | None:
    """Turns of a provider, by a clock; None where it cannot be captured in a graph."""

    def call(i: int) -> Any:
        return provider.run(inputs[i])

    sets = len(inputs)
    with provider.scope(case.training):
        if clock == "wall":
            visit = wall_visit(call, sets, budget.turn_seconds, synchronise=case.device == "cuda")
        elif clock == "events":
            visit = event_visit(call, sets, budget.turn_seconds)
        else:
            try:
                visit = graph_visit(call, sets, budget.turn_seconds)
            except RuntimeError as error:
                print(f"  {provider.name}: no CUDA graph: {str(error).splitlines()[0]}")
                return None

    def scoped() -> float:
        with provider.scope(case.training):
            return visit()

    return scoped


def _row(case: Case, provider: Provider, sets: int) -> dict[str, Any]:
    batch, tokens, channels = case.shape
    return {
        "suite": "micro",
        "case": case.name,
        "op": case.op,
        "model": case.model,
        "shape": {"B": batch, "N": tokens, "C": channels, "D": case.metric_dim, "H": case.heads},
        "r": case.r,
        "reduce": case.reduce if case.op == "merge" else None,
        "pass": "forward and backward" if case.training else "forward",
        "dtype": case.dtype,
        "device": case.device,
        "provider": provider.name,
        "input_sets": sets,
    }


def _statistics(seconds: dict[str, list[float]], name: str) -> dict[str, Any]:
    summary = summarise(seconds[name])
    return {
        "median_us": summary.median * 1e6,
        "p20_us": summary.low * 1e6,
        "p80_us": summary.high * 1e6,
        "rounds": len(seconds[name]),
        "speedup_published": ratio(seconds[PUBLISHED], seconds[name]) if PUBLISHED in seconds else None,
        "speedup_compiled": ratio(seconds[COMPILED], seconds[name]) if COMPILED in seconds else None,
        "speedup_reference": ratio(seconds[REFERENCE], seconds[name]) if REFERENCE in seconds else None,
        "times_fused": ratio(seconds[name], seconds[FUSED]) if FUSED in seconds else None,
        "times_clone": ratio(seconds[name], seconds[CLONE]) if CLONE in seconds else None,
    }


def _add_rates(row: dict[str, Any], case: Case, ceilings: Ceilings) -> None:
    """Shares of the ceilings; none for a call so small that only the host's overhead is measured."""
    count, seconds = traffic.least_bytes(case), row["median_us"] / 1e6
    if row["provider"] == CLONE:
        copied = case.shape[1] if case.op != "unmerge" else traffic.slots(case)
        count = 2 * case.shape[0] * copied * case.shape[2] * traffic.ITEM[case.dtype]
    row["bytes"] = count
    row["operations"] = traffic.operations(case)
    if not case.host:
        row["gigabytes_per_second"] = count / seconds / 1e9
        row["copy_share"] = count / seconds / ceilings.copy
        row["floor_us"] = ceilings.floor_seconds(case) * 1e6
        if row["operations"]:
            row["matmul_share"] = row["operations"] / seconds / ceilings.matmul[case.dtype]


def _whole_peaks(case: Case, competing: list[Provider]) -> dict[str, int | None]:
    """Peak memory by provider, C++ code's included: on a CPU, where a target asks, for it takes seconds to find."""
    shares = ("peak_share_published", "working_share_published")
    if case.device != "cpu" or all(target.measure not in shares for target in case.targets):
        return {}
    return {p.name: resident.peak_bytes(case, p) for p in competing if p.name not in (COMPILED, REFERENCE)}


def _add_peaks(row: dict[str, Any], case: Case, peaks: dict[str, int | None]) -> None:
    row["resident_bytes"] = peaks.get(row["provider"])
    row["peak_per_token"] = row["peak_bytes"] / (case.shape[0] * case.shape[1])
    row["peak_share_published"] = row["working_share_published"] = None
    if row["resident_bytes"] and peaks.get(PUBLISHED):
        row["peak_share_published"] = row["resident_bytes"] / peaks[PUBLISHED]
        own = family(case)
        if hasattr(own, "result_bytes"):
            results = own.result_bytes(case)
            row["working_share_published"] = (row["resident_bytes"] - results) / (peaks[PUBLISHED] - results)
