# SPDX-License-Identifier: MIT
"""The model suite: models as they are and patched with ToMe, in turns on the same images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import tokred_kernels as tk
from benchmarks import footprint
from benchmarks.agreement import Disagreement
from benchmarks.micro import Settings, judge
from benchmarks.model_cases import ModelCase
from benchmarks.model_zoo import make_model, output_of
from benchmarks.providers import NONE_FAILED, REFERENCE, Failed
from benchmarks.record import release, told
from benchmarks.timing import Visit, event_visit, graph_visit, interleave, ratio, summarise, wall_visit
from tokred_kernels import backends
from tokred_kernels.flops import count, image_size
from tokred_kernels.models.base import model_spec
from tokred_kernels.patching import patch, unpatch

UNPATCHED = "unpatched"
PATCHED_OPS = ("bipartite_match", "merge")
ATTENTION = "token_attention"  # a backend without a kernel for it leaves it to torch
SEED = 11
CLOCKS: dict[str, dict[str, Callable[..., Visit]]] = {
    "cpu": {"wall": wall_visit},
    "cuda": {"events": event_visit, "graph": graph_visit},
}
IMAGE_SETS = 2  # the activations of a model are past every cache by themselves
SAME_OUTPUT = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # r = 0 against unpatched, of the largest output


def measure(case: ModelCase, settings: Settings) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """A row for the unpatched model and one for each backend, and what those failed by that have none.

    A backend is not timed with which the patched model with r = 0 is another model, or its output is not finite.
    """
    torch.manual_seed(SEED)
    dtype = getattr(torch, case.dtype)
    plain = make_model(case.model).to(case.device, dtype)
    size = image_size(plain)
    images = [torch.randn(case.batch, 3, *size, device=case.device, dtype=dtype) for _ in range(IMAGE_SETS)]
    able = [name for name in settings.backends if reason_against(case, name, settings.failed) is None]
    if settings.quick:
        able = [name for name in able if name != REFERENCE] or able

    models: dict[str, nn.Module] = {UNPATCHED: plain}
    visits = {UNPATCHED: _visits(case, UNPATCHED, plain, images, settings)}
    lost: dict[str, dict[str, str]] = {}
    for name in able:
        try:
            with _scope(name):
                _check(case, name, plain, images[0])
            model = patch(copy.deepcopy(plain), "tome", r=case.r)
            visits[name] = _visits(case, name, model, images, settings)
            models[name] = model
        except Exception as error:  # of torch, a compiler, a driver; it is recorded
            lost[name] = told(error)
        if name in lost:  # here the error and what it held are gone
            model = None
            release(case.device)

    seconds = {}
    for clock in visits[UNPATCHED]:
        seconds[clock] = interleave({name: of[clock] for name, of in visits.items() if clock in of}, settings.budget)
    flops = {name: count(model) for name, model in models.items()}
    rows = []
    for name, model in models.items():
        with _scope(name):
            peak = footprint.peak_bytes(lambda m=model: output_of(m, images[0]), case.device)
            launches = footprint.launches(lambda m=model: output_of(m, images[0])) if case.device == "cuda" else None
        row = {
            "suite": "model",
            "case": case.name,
            "model": case.model,
            "shape": {"batch": case.batch, "image": list(size)},
            "r": case.r,
            "dtype": case.dtype,
            "device": case.device,
            "provider": name,
            "serves": _serving(case, name, model, flops[name].tokens[:-1]),
            # The unpatched model's time is beside it by the same clock, whatever the unpatched model's row stands for.
            "clocks": {clock: _statistics(case, of, name) for clock, of in seconds.items() if name in of},
            "tokens_left": flops[name].tokens[-1],
            "gflops": flops[name].gflops,
            "flops_ratio": flops[UNPATCHED].total / flops[name].total,
            "peak_bytes": peak,
            "launches": launches,
        }
        for statistics in row["clocks"].values():
            statistics["flops_efficiency"] = statistics["speed_ratio"] / row["flops_ratio"]
        # A row stands for the last clock that could be used on its provider: graphs, where the model can be captured.
        row["clock"] = list(row["clocks"])[-1]
        row |= row["clocks"][row["clock"]]
        ours = name not in (UNPATCHED, REFERENCE) and not any(REFERENCE in who for who in row["serves"].values())
        row["targets"] = [judge(t, row) for t in case.targets] if ours else []
        rows.append(row)
    return rows, lost


def reason_against(case: ModelCase, backend: str, failed: Failed = NONE_FAILED) -> str | None:
    """Return why a backend cannot run a patched model, or must not, as its kernels did not pass the self-check."""
    if backend == backends.AUTO:
        return None
    dtype = getattr(torch, case.dtype)
    reasons = [backends.can_run(op, backend, case.device, dtype) for op in PATCHED_OPS]
    reasons += [failed.get((backend, op)) for op in (*PATCHED_OPS, ATTENTION)]
    return next((reason for reason in reasons if reason is not None), None)


def _serving(case: ModelCase, name: str, model: Any, tokens: tuple[float, ...]) -> dict[str, str]:
    """Return the backend of each op of a patched model. `auto` may choose a different one for each.

    `tokens` holds the token count of each block. If attention runs on several backends, they are joined by "+".
    """
    if name == UNPATCHED:
        return {}
    with tk.use_backend(name):
        tensor = torch.empty(0, device=case.device, dtype=getattr(torch, case.dtype))
        served = {op: backends.choose(op, tensor) for op in PATCHED_OPS}
        attends = []
        width = model_spec(model).block_specs[0].head_dim
        for number in tokens:
            q = tensor.new_empty(0, 1, int(number), width)
            by_torch = backends.use_sdpa(ATTENTION, q, plain=False)
            attends.append("torch" if by_torch else backends.choose(ATTENTION, q))
        return served | {ATTENTION: "+".join(dict.fromkeys(attends))}


def _statistics(case: ModelCase, seconds: dict[str, list[float]], name: str) -> dict[str, Any]:
    summary, unpatched = summarise(seconds[name]), summarise(seconds[UNPATCHED])
    return {
        "rounds": len(seconds[name]),
        "median_us": summary.median * 1e6,
        "p20_us": summary.low * 1e6,
        "p80_us": summary.high * 1e6,
        "images_per_second": case.batch / summary.median,
        "p20_images_per_second": case.batch / summary.high,
        "p80_images_per_second": case.batch / summary.low,
        "unpatched_images_per_second": case.batch / unpatched.median,
        "speed_ratio": ratio(seconds[UNPATCHED], seconds[name]),
    }


@contextmanager
def _scope(name: str) -> Iterator[None]:
    with tk.use_backend("auto" if name == UNPATCHED else name), torch.inference_mode():
        yield


def _visits(case: ModelCase, name: str, model: nn.Module, images: list[Tensor], settings: Settings) -> dict[str, Visit]:
    """Turns of a model by clock: on a GPU events, and replayed graphs where it can be captured."""

    def call(i: int) -> Tensor:
        return output_of(model, images[i])

    visits = {}
    for clock, make in CLOCKS[case.device].items():
        with _scope(name):
            try:
                visit = make(call, len(images), settings.budget.turn_seconds)
            except RuntimeError as error:
                if clock != "graph":
                    raise
                print(f"  {name}: no CUDA graph: {str(error).splitlines()[0]}")
                continue

        def scoped(visit: Visit = visit) -> float:
            with _scope(name):
                return visit()

        visits[clock] = scoped
    return visits


def _check(case: ModelCase, backend: str, plain: nn.Module, images: Tensor) -> None:
    """A patch that removes nothing must change nothing; one that removes must still give numbers."""
    expected = output_of(plain, images)
    model = patch(copy.deepcopy(plain), "tome", r=0)
    error = float((output_of(model, images) - expected).abs().max() / expected.abs().max())
    if not error <= SAME_OUTPUT[case.dtype]:
        raise Disagreement(f"{case.name}: {backend}: patched with r=0 the output is off by {error:.2g}")
    if not bool(output_of(patch(unpatch(model), "tome", r=case.r), images).isfinite().all()):
        raise Disagreement(f"{case.name}: {backend}: patched with r={case.r} the output is not finite")
