# SPDX-License-Identifier: MIT
"""The micro suite: one op at one shape, all providers checked, then timed in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks import footprint, resident, traffic
from benchmarks.agreement import check
from benchmarks.cases import ADAPTIVE_OPS, Case, Target
from benchmarks.ceilings import Ceilings
from benchmarks.families import family
from benchmarks.inputs import Inputs, draw
from benchmarks.providers import CLONE, COMPILED, FUSED, PUBLISHED, REFERENCE, Provider, providers
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
    """What a run asks for, over all its cases."""

    budget: Budget
    backends: list[str]
    quick: bool


def measure(case: Case, settings: Settings, ceilings: Ceilings) -> list[dict[str, Any]]:
    """A row for each provider of a case.

    Raises:
        Disagreement: a provider's result is wrong; nothing of this case is timed then.
    """
    compile_chain = case.quick_compile or not settings.quick
    competing = providers(case, settings.backends, compile_chain)
    first = draw(case, SEED)
    chosen = {provider.name: check(case, provider, first) for provider in competing}

    sets = 1 if case.host else sets_past_cache(traffic.least_bytes(case), case.device)
    inputs = [first] + [draw(case, SEED + i) for i in range(1, sets)]
    peaks = _whole_peaks(case, competing)
    clocks = _clocks(case)
    seconds = {clock: _timed(case, competing, inputs, settings.budget, clock) for clock in clocks}

    rows = []
    for provider in competing:
        row = _row(case, provider, sets)
        baseline = chosen.get(PUBLISHED)
        if chosen[provider.name] is not None and baseline is not None and case.op not in SLOTS_OF_THEIR_OWN:
            row["tokens_unlike_published"] = int((chosen[provider.name] != baseline).sum())
        with provider.scope(case.training):
            row["launches"] = footprint.launches(lambda p=provider: p.run(first)) if case.device == "cuda" else None
            row["peak_bytes"] = footprint.peak_bytes(lambda p=provider: p.run(first), case.device)
        # The row stands for the last clock that could be used on its provider; the others are kept beside it.
        row["clocks"] = {c: _statistics(seconds[c], provider.name) for c in clocks if provider.name in seconds[c]}
        row["clock"] = list(row["clocks"])[-1]
        row |= row["clocks"][row["clock"]]
        _add_rates(row, case, ceilings)
        _add_peaks(row, case, peaks)
        ours = provider.backend not in (None, REFERENCE)
        row["targets"] = [judge(target, row) for target in case.targets] if ours else []
        rows.append(row)
    return rows


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


def _timed(
    case: Case, competing: list[Provider], inputs: list[Inputs], budget: Budget, clock: str
) -> dict[str, list[float]]:
    visits: dict[str, Visit] = {}
    for provider in competing:
        with provider.scope(case.training):
            visit = _visit(case, provider, inputs, budget, clock)
        if visit is None:
            continue

        def scoped(visit: Visit = visit, provider: Provider = provider) -> float:
            with provider.scope(case.training):
                return visit()

        visits[provider.name] = scoped
    return interleave(visits, budget)


def _visit(case: Case, provider: Provider, inputs: list[Inputs], budget: Budget, clock: str) -> Visit | None:
    def call(i: int) -> Any:
        return provider.run(inputs[i])

    sets = len(inputs)
    if clock == "wall":
        return wall_visit(call, sets, budget.turn_seconds, synchronise=case.device == "cuda")
    if clock == "events":
        return event_visit(call, sets, budget.turn_seconds)
    try:
        return graph_visit(call, sets, budget.turn_seconds)
    except RuntimeError as error:
        print(f"  {provider.name}: no CUDA graph: {str(error).splitlines()[0]}")
        return None


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
