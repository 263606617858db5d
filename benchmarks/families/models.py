# SPDX-License-Identifier: MIT
"""Whole models, unpatched and patched with ToMe, in turns on the same images. Their weights are random."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tokred_kernels as tk
from benchmarks.harness import memory
from benchmarks.harness.case import Target
from benchmarks.harness.check import Disagreement
from benchmarks.harness.measure import Settings, make_visit
from benchmarks.harness.providers import REFERENCE, Failed
from benchmarks.harness.records import Failures, Row, error_facts, release
from benchmarks.harness.timing import Visit, interleave, ratio, summarise
from tokred_kernels import backends
from tokred_kernels.models.imports import import_with_torchvision

UNPATCHED = "unpatched"
# A backend without a kernel for token attention leaves it to torch, so only the first two are required.
REQUIRED_OPS, OPTIONAL_OP = ("bipartite_match", "merge"), "token_attention"
SEED = 11
CLOCKS = {"cpu": ("wall",), "cuda": ("events", "graph")}
IMAGE_SETS = 2  # a model's activations exceed every cache, so two are enough
SAME_OUTPUT = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # r = 0 against unpatched, of the largest value
TRANSFORMERS = "transformers/"
# Classes of transformers, and how the published model differs from the default configuration.
CLASSES = {
    "dinov2-small": ("Dinov2Model", "Dinov2Config", {"hidden_size": 384, "num_attention_heads": 6, "image_size": 224}),
    "siglip-base-patch16-224": ("SiglipVisionModel", "SiglipVisionConfig", {}),
}


@dataclass(frozen=True)
class ModelCase:
    """A model of timm, or of transformers if its name begins with "transformers/"."""

    model: str
    batch: int
    r: int
    device: str
    dtype: str = "float32"
    quick: bool = False
    targets: tuple[Target, ...] = ()

    @property
    def name(self) -> str:
        """The key of this case in the recorded results."""
        return f"model/{self.model}/b{self.batch}/r{self.r}/{self.dtype}/{self.device}"

    def make(self) -> nn.Module:
        """Return the model in eval mode."""
        if not self.model.startswith(TRANSFORMERS):
            return import_with_torchvision("timm").create_model(self.model).eval()
        library: Any = import_with_torchvision("transformers")
        kind, configuration, settings = CLASSES[self.model.removeprefix(TRANSFORMERS)]
        return getattr(library, kind)(getattr(library, configuration)(**settings)).eval()


BF16 = "bfloat16"
MODEL_CASES = (
    ModelCase("deit_small_patch16_224", 4, 16, "cpu", quick=True),
    ModelCase("deit_small_patch16_224", 8, 8, "cpu"),
    ModelCase("vit_base_patch16_224", 8, 16, "cpu"),
    ModelCase("vit_small_patch16_dinov3", 8, 16, "cpu"),
    ModelCase("transformers/dinov2-small", 8, 16, "cpu"),
    ModelCase("transformers/siglip-base-patch16-224", 8, 16, "cpu"),
    ModelCase("deit_small_patch16_224", 8, 8, "cpu", BF16),
    ModelCase("vit_base_patch16_224", 8, 16, "cpu", BF16),
    ModelCase("deit_small_patch16_224", 64, 16, "cuda", BF16, quick=True),
    ModelCase("vit_base_patch16_224", 64, 16, "cuda", BF16),
    ModelCase("vit_base_patch16_dinov3", 64, 16, "cuda", BF16),
    ModelCase("vit_large_patch16_224", 64, 8, "cuda", BF16, quick=True, targets=(Target("flops_efficiency", 0.9),)),
)


def measure(case: ModelCase, settings: Settings) -> tuple[list[Row], Failures]:
    """Return a row for the unpatched model and for each backend that works, and the errors of the others."""
    torch.manual_seed(SEED)
    dtype = getattr(torch, case.dtype)
    plain = case.make().to(case.device, dtype)
    size = tk.flops.image_size(plain)
    images = [torch.randn(case.batch, 3, *size, device=case.device, dtype=dtype) for _ in range(IMAGE_SETS)]
    able = [name for name in settings.backends if reason_against(case, name, settings.failed) is None]
    if settings.quick:
        able = [name for name in able if name != REFERENCE] or able

    models: dict[str, nn.Module] = {UNPATCHED: plain}
    visits = {UNPATCHED: _visits(case, UNPATCHED, plain, images, settings)}
    failures: Failures = {}
    for name in able:
        model = None
        try:
            with _scope(name):
                _check(case, name, plain, images[0])
            model = tk.patch(copy.deepcopy(plain), "tome", r=case.r)
            visits[name] = _visits(case, name, model, images, settings)
            models[name] = model
        except Exception as error:  # of torch, a compiler or a driver
            failures[name] = error_facts(error)
        if name in failures:  # outside of the handler, where the error no longer holds its tensors
            model = None
            release(case.device)

    seconds = {}
    for clock in visits[UNPATCHED]:
        seconds[clock] = interleave({name: of[clock] for name, of in visits.items() if clock in of}, settings.budget)
    flops = {name: tk.flops.count(model) for name, model in models.items()}
    rows = []
    for name, model in models.items():

        def call(model: nn.Module = model) -> Tensor:
            return output_of(model, images[0])

        with _scope(name):
            peak = memory.peak_bytes(call, case.device)
        row: Row = {
            "suite": "model", "case": case.name, "model": case.model, "shape": [case.batch, 3, *size], "r": case.r,
            "dtype": case.dtype, "device": case.device, "provider": name,
            "tokens_left": flops[name].tokens[-1], "gflops": flops[name].gflops,
            "flops_ratio": flops[UNPATCHED].total / flops[name].total,
            "peak_bytes": peak,
            "clocks": {clock: _statistics(case, of, name) for clock, of in seconds.items() if name in of},
        }  # fmt: skip
        for statistics in row["clocks"].values():
            statistics["flops_efficiency"] = statistics["speed_ratio"] / row["flops_ratio"]
        # The last clock that works gives the row's own statistics: graphs, if the model can be captured.
        row["clock"] = list(row["clocks"])[-1]
        row |= row["clocks"][row["clock"]]
        row["targets"] = [t.judge(row) for t in case.targets] if name not in (UNPATCHED, REFERENCE) else []
        rows.append(row)
    return rows, failures


def reason_against(case: ModelCase, backend: str, failed: Failed | None = None) -> str | None:
    """Return why a backend cannot run a patched model or did not pass the self-check in its ops, or None."""
    if backend == backends.AUTO:
        return None
    dtype = getattr(torch, case.dtype)
    reasons = [backends.can_run(op, backend, case.device, dtype) for op in REQUIRED_OPS]
    reasons += [(failed or {}).get((backend, op)) for op in (*REQUIRED_OPS, OPTIONAL_OP)]
    return next(filter(None, reasons), None)


def output_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits, or the pooled vector of a model without a head."""
    output = model(images)
    return output if isinstance(output, Tensor) else output.pooler_output


def _statistics(case: ModelCase, seconds: dict[str, list[float]], name: str) -> Row:
    own, unpatched = summarise(seconds[name]), summarise(seconds[UNPATCHED])
    return {
        "rounds": len(seconds[name]),
        "median_us": own.median * 1e6,
        "images_per_second": case.batch / own.median,
        "p20_images_per_second": case.batch / own.high,
        "p80_images_per_second": case.batch / own.low,
        "unpatched_images_per_second": case.batch / unpatched.median,  # by the same clock
        "speed_ratio": ratio(seconds[UNPATCHED], seconds[name]),
    }


@contextmanager
def _scope(name: str) -> Iterator[None]:
    with tk.use_backend("auto" if name == UNPATCHED else name), torch.inference_mode():
        yield


def _visits(case: ModelCase, name: str, model: nn.Module, images: list[Tensor], settings: Settings) -> dict[str, Visit]:
    """Return turns of a model by clock, without CUDA graphs if it cannot be captured."""

    def call(i: int) -> Tensor:
        return output_of(model, images[i])

    seconds, scope = settings.budget.turn_seconds, partial(_scope, name)
    visits = {clock: make_visit(clock, call, len(images), seconds, scope) for clock in CLOCKS[case.device]}
    return {clock: visit for clock, visit in visits.items() if visit}


def _check(case: ModelCase, backend: str, plain: nn.Module, images: Tensor) -> None:
    """Raise Disagreement unless r = 0 changes nothing and the case's r gives finite outputs."""
    right = output_of(plain, images)
    model = tk.patch(copy.deepcopy(plain), "tome", r=0)
    error = float((output_of(model, images) - right).abs().max() / right.abs().max())
    if not error <= SAME_OUTPUT[case.dtype]:
        raise Disagreement(f"{case.name}: {backend}: patched with r=0 the output is off by {error:.2g}")
    if not bool(output_of(tk.patch(tk.unpatch(model), "tome", r=case.r), images).isfinite().all()):
        raise Disagreement(f"{case.name}: {backend}: patched with r={case.r} the output is not finite")
