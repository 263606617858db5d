# SPDX-License-Identifier: MIT
"""Measures one case: checks the result of every provider, then times the providers in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.harness import memory
from benchmarks.harness.case import ADAPTIVE_OPS, Case
from benchmarks.harness.check import SEED as CHECK_SEED
from benchmarks.harness.check import Disagreement, check, expected
from benchmarks.harness.providers import BASELINE, COMPILED, REFERENCE, YARDSTICKS, Failed, Provider, providers
from benchmarks.harness.rates import Rates
from benchmarks.harness.records import Failures, Row, error_facts, release
from benchmarks.harness.timing import (
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

COMPARED = {
    "speedup": BASELINE,
    "speedup_compiled": COMPILED,
    "speedup_reference": REFERENCE,
    "times_clone": "clone",
    "times_fused": "fused",
}
SEED = 7


@dataclass(frozen=True)
class Settings:
    """The settings of a run."""

    budget: Budget
    backends: list[str]
    quick: bool
    failed: Failed = field(default_factory=dict)


def measure(case: Case, settings: Settings, rates: Rates) -> tuple[list[Row], Failures]:
    """Return a row for each provider that works, and the errors of the others by name."""
    compile_baseline = case.quick_compile or not settings.quick
    competing = providers(case, settings.backends, compile_baseline, settings.failed)
    failures: Failures = {}

    def each(step: Callable[[Provider], Any]) -> dict[str, Any]:
        """Return the result of a step by provider, for those that have not failed."""
        results = {}
        for provider in competing:
            if provider.name in failures:
                continue
            try:
                with provider.scope(case.training):
                    results[provider.name] = step(provider)
            except Exception as error:  # of torch, a compiler or a driver
                failures[provider.name] = error_facts(error)
            if provider.name in failures:  # outside of the handler, where the error no longer holds its tensors
                release(case.device)
        return results

    first = case.draw(SEED)
    right = expected(case, first)

    def verify(provider: Provider) -> None:
        if provider.name in YARDSTICKS:
            return
        torch.manual_seed(CHECK_SEED)
        try:
            check(case, first, provider.run(first), right, baseline=provider.backend is None)
        except Disagreement as error:
            raise Disagreement(f"{case.name}: {provider.name}: {error}") from None

    each(verify)
    sets = 1 if case.host else sets_past_cache(case.least_bytes(), case.device)
    inputs = [first] + [case.draw(SEED + i) for i in range(1, sets)]
    resident: dict[str, int | None] = {}
    if case.device == "cpu" and any(target.measure in ("peak_share", "working_share") for target in case.targets):
        # Only for these targets, and these providers, because it takes seconds.
        resident = each(lambda p: p.name in (COMPILED, REFERENCE) or memory.resident_peak_bytes(case, p.name))
        resident = {name: peak for name, peak in resident.items() if peak is not True}
    seconds: dict[str, dict[str, list[float]]] = {}
    for clock in _clocks(case):

        def visit(provider: Provider, clock: str = clock) -> Visit | None:
            scope = partial(provider.scope, case.training)
            return make_visit(clock, lambda i: provider.run(inputs[i]), sets, settings.budget.turn_seconds, scope)

        visits = each(visit)
        seconds[clock] = interleave({name: visit for name, visit in visits.items() if visit}, settings.budget)

    def row(provider: Provider) -> Row:
        made: Row = {
            "suite": "micro", "case": case.name, "op": case.op, "shape": case.shape, "dtype": case.dtype,
            "device": case.device, "provider": provider.name, "input_sets": sets,
            "peak_bytes": memory.peak_bytes(lambda: provider.run(first), case.device),
            "clocks": {c: _statistics(of, provider.name) for c, of in seconds.items() if provider.name in of},
        }  # fmt: skip
        # The last clock that works for the provider gives the row's own statistics.
        made["clock"] = list(made["clocks"])[-1]
        made |= made["clocks"][made["clock"]]
        made |= _shares(case, made, rates, resident)
        judged = provider.backend not in (None, REFERENCE)
        made["targets"] = [target.judge(made) for target in case.targets] if judged else []
        return made

    return list(each(row).values()), failures


def _clocks(case: Case) -> tuple[str, ...]:
    if case.device == "cpu":
        return ("wall",)
    if case.host:
        return ("host",)
    return ("events",) if case.op in ADAPTIVE_OPS else ("events", "graph")  # a read to the host cannot be captured


def make_visit(
    clock: str, call: Callable[[int], Any], sets: int, turn_seconds: float, scope: Callable[[], Any]
) -> Visit | None:
    """Return turns of a call by a clock, inside a scope, or None if it cannot be captured in a CUDA graph."""
    with scope():
        if clock == "wall":
            visit = wall_visit(call, sets, turn_seconds)
        elif clock == "host":
            visit = wall_visit(call, sets, turn_seconds, synchronise=True)
        elif clock == "events":
            visit = event_visit(call, sets, turn_seconds)
        else:
            try:
                visit = graph_visit(call, sets, turn_seconds)
            except RuntimeError as error:
                print(f"  no CUDA graph: {str(error).splitlines()[0]}")
                return None

    def scoped() -> float:
        with scope():
            return visit()

    return scoped


def _statistics(seconds: dict[str, list[float]], name: str) -> Row:
    median, low, high = (1e6 * part for part in summarise(seconds[name]))
    row: Row = {"median_us": median, "p20_us": low, "p80_us": high, "rounds": len(seconds[name])}
    for measure_name, other in COMPARED.items():
        pair = (name, other) if measure_name.startswith("times") else (other, name)
        row[measure_name] = ratio(*(seconds[one] for one in pair)) if other in seconds else None
    return row


def _shares(case: Case, row: Row, rates: Rates, resident: dict[str, int | None]) -> Row:
    """Return the row's shares of the lower bounds and of the baseline's memory."""
    count, seconds = case.least_bytes(), row["median_us"] / 1e6
    if row["provider"] == "clone":
        tokens = case.slots() if case.op == "unmerge" else case.shape[1]
        count = 2 * case.shape[0] * tokens * case.shape[2] * case.item
    found: Row = {"bytes": count, "operations": case.operations()}
    if not case.host:  # tiny tensors measure only the overhead
        found["copy_share"] = count / seconds / rates.copy
        found["least_us"] = rates.least_seconds(case) * 1e6
        if found["operations"]:
            found["matmul_share"] = found["operations"] / seconds / rates.matmul[case.dtype]
    found["peak_per_token"] = row["peak_bytes"] / (case.shape[0] * case.shape[1])
    peak, baseline = resident.get(row["provider"]), resident.get(BASELINE)
    if peak and baseline:
        results = case.result_bytes()
        found |= {"resident_bytes": peak, "peak_share": peak / baseline}
        found["working_share"] = (peak - results) / (baseline - results)
    return found
