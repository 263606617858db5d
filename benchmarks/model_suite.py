# SPDX-License-Identifier: MIT
"""The model suite: timm models as they are and patched with ToMe, in turns on the same images."""

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
from benchmarks.cases import ModelCase
from benchmarks.micro import Settings, judge
from benchmarks.providers import REFERENCE
from benchmarks.timing import Visit, event_visit, interleave, ratio, summarise, wall_visit
from tokred_kernels import backends
from tokred_kernels.flops import count
from tokred_kernels.patch import patch, unpatch
from tokred_kernels.patch.timm_import import import_timm

UNPATCHED = "unpatched"
SEED = 11
IMAGE_SETS = 2  # the activations of a model are past every cache by themselves
SAME_OUTPUT = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # r = 0 against unpatched, of the largest output


def measure(case: ModelCase, settings: Settings) -> list[dict[str, Any]]:
    """A row for the unpatched model and one for each backend.

    Raises:
        Disagreement: the patched model with r = 0 is another model, or its output is not finite.
    """
    torch.manual_seed(SEED)
    dtype = getattr(torch, case.dtype)
    plain = import_timm().create_model(case.model).eval().to(case.device, dtype)
    size = plain.patch_embed.img_size
    images = [torch.randn(case.batch, 3, *size, device=case.device, dtype=dtype) for _ in range(IMAGE_SETS)]
    able = [name for name in settings.backends if reason_against(case, name) is None]
    if settings.quick:
        able = [name for name in able if name != REFERENCE] or able

    models: dict[str, nn.Module] = {UNPATCHED: plain}
    for name in able:
        with _scope(name):
            _check(case, name, plain, images[0])
        models[name] = patch(copy.deepcopy(plain), "tome", r=case.r)

    visits = {name: _visit(case, name, model, images, settings.budget.turn_seconds) for name, model in models.items()}
    seconds = interleave(visits, settings.budget)
    flops = {name: count(model) for name, model in models.items()}
    rows = []
    for name, model in models.items():
        with _scope(name):
            peak = footprint.peak_bytes(lambda m=model: m(images[0]), case.device)
            launches = footprint.launches(lambda m=model: m(images[0])) if case.device == "cuda" else None
        summary = summarise(seconds[name])
        row = {
            "suite": "model",
            "case": case.name,
            "model": case.model,
            "shape": {"batch": case.batch, "image": list(size)},
            "r": case.r,
            "dtype": case.dtype,
            "device": case.device,
            "provider": name,
            "clock": "events" if case.device == "cuda" else "wall",
            "rounds": len(seconds[name]),
            "median_us": summary.median * 1e6,
            "p20_us": summary.low * 1e6,
            "p80_us": summary.high * 1e6,
            "images_per_second": case.batch / summary.median,
            "p20_images_per_second": case.batch / summary.high,
            "p80_images_per_second": case.batch / summary.low,
            "tokens_left": flops[name].tokens[-1],
            "gflops": flops[name].gflops,
            "speed_ratio": ratio(seconds[UNPATCHED], seconds[name]),
            "flops_ratio": flops[UNPATCHED].total / flops[name].total,
            "peak_bytes": peak,
            "launches": launches,
        }
        row["flops_efficiency"] = row["speed_ratio"] / row["flops_ratio"]
        row["targets"] = [judge(t, row) for t in case.targets] if name not in (UNPATCHED, REFERENCE) else []
        rows.append(row)
    return rows


def reason_against(case: ModelCase, backend: str) -> str | None:
    """Why a backend cannot run a patched model; None where it can."""
    for op in ("bipartite_match", "merge"):
        reason = backends.reason_against(op, backend, case.device, getattr(torch, case.dtype))
        if reason is not None:
            return reason
    return None


@contextmanager
def _scope(name: str) -> Iterator[None]:
    with tk.use_backend("auto" if name == UNPATCHED else name), torch.inference_mode():
        yield


def _visit(case: ModelCase, name: str, model: nn.Module, images: list[Tensor], turn_seconds: float) -> Visit:
    def call(i: int) -> Tensor:
        return model(images[i])

    make: Callable[..., Visit] = event_visit if case.device == "cuda" else wall_visit
    with _scope(name):
        visit = make(call, len(images), turn_seconds)

    def scoped() -> float:
        with _scope(name):
            return visit()

    return scoped


def _check(case: ModelCase, backend: str, plain: nn.Module, images: Tensor) -> None:
    """A patch that removes nothing must change nothing; one that removes must still give numbers."""
    expected = plain(images)
    model = patch(copy.deepcopy(plain), "tome", r=0)
    error = float((model(images) - expected).abs().max() / expected.abs().max())
    if not error <= SAME_OUTPUT[case.dtype]:
        raise Disagreement(f"{case.name}: {backend}: patched with r=0 the output is off by {error:.2g}")
    if not bool(patch(unpatch(model), "tome", r=case.r)(images).isfinite().all()):
        raise Disagreement(f"{case.name}: {backend}: patched with r={case.r} the output is not finite")
