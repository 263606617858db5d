# SPDX-License-Identifier: MIT
"""What competes in a case: the PyTorch baseline, its compiled form, yardsticks, and the backends of this package."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

import tokred_kernels as tk
from benchmarks.harness.case import ADAPTIVE_OPS, KERNELS, Case
from benchmarks.harness.check import with_backward
from tokred_kernels import backends
from tokred_kernels.ops.registry import SPECS

BASELINE, COMPILED, REFERENCE = "baseline", "compiled", "reference"
YARDSTICKS = ("clone", "fused", "flex")
# Why a kernel did not pass the self-check, by backend and op.
Failed = Mapping[tuple[str, str], str]


@dataclass(frozen=True)
class Provider:
    """One column of a comparison: a baseline, a yardstick, or a backend of this package."""

    name: str
    run: Callable[[SimpleNamespace], Any]
    backend: str | None = None

    @contextmanager
    def scope(self, training: bool) -> Iterator[None]:
        """Set the backend and the gradient mode."""
        chosen = tk.use_backend(self.backend) if self.backend else nullcontext()
        with chosen, torch.set_grad_enabled(training):
            yield


def providers(case: Case, chosen: list[str], compile_baseline: bool, failed: Failed | None = None) -> list[Provider]:
    """Return the baselines and yardsticks, then those of the `chosen` backends that can run the case."""
    found = []
    baseline = case.baseline()
    if baseline is not None:
        function, names = baseline

        def call(function: Callable[..., Any], inputs: SimpleNamespace) -> Any:
            return function(*(getattr(inputs, name) for name in names))

        found.append(Provider(BASELINE, partial(call, function)))
        # The host reads an adaptive count, so such a baseline is compiled in parts, and again for each count. On a GPU
        # several input sets with different counts rotate: there it has no compiled form.
        in_parts = case.op in ADAPTIVE_OPS
        if compile_baseline and not (in_parts and case.device == "cuda"):
            torch._dynamo.reset()  # all cases share few code objects, whose recompilations are limited
            if in_parts:
                logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # a long warning at each graph break
            compiled = torch.compile(function, fullgraph=not in_parts, dynamic=False)
            found.append(Provider(COMPILED, partial(call, compiled)))
    found += [Provider(name, run) for name, run in case.yardsticks().items() if name != "flex" or compile_baseline]
    if any(target.measure == "speedup_reference" for target in case.targets):
        chosen = list(dict.fromkeys([REFERENCE, *chosen]))
    found += [Provider(name, case.ours, name) for name in chosen if reason_against(case, name, failed) is None]
    if case.training:
        found = [Provider(p.name, with_backward(p.run), p.backend) for p in found]
    return found


def reason_against(case: Case, backend: str, failed: Failed | None = None) -> str | None:
    """Return why a backend cannot run a case or did not pass the self-check in it, or None."""
    ops = KERNELS[case.op]
    if case.training:
        ops += tuple(SPECS[op].backward for op in ops if SPECS[op].backward)
    reasons = (
        backends.can_run(op, backend, case.device, case.torch_dtype) or (failed or {}).get((backend, op)) for op in ops
    )
    return next(filter(None, reasons), None)
