# SPDX-License-Identifier: MIT
"""Checks results before they are timed: a wrong kernel gets no time.

The expected results are those of the reference backend on float64 inputs. The tests prove the kernels; this check
finds a kernel that is wrong on this machine or at these shapes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import tokred_kernels as tk
from benchmarks.baselines.tome import token_map
from benchmarks.harness.case import Case

SEED = 20  # before each call, so that random matching draws the same tokens
# Largest error relative to the largest value. Our kernels round once, at the end; the baselines round each step.
FLOAT32_BOUND = 1e-5
ROUNDINGS, TRAINING_ROUNDINGS, BASELINE_ROUNDINGS = 1, 2, 6
# Near-ties let a right map differ from the expected one. Then what a merge loses is still the same, up to this share.
LOSS_BOUND, BASELINE_LOSS_BOUND = 0.01, 0.1
SAME_SLOTS = 0.9  # share of the tokens that must be in the expected slot; a near-tie swaps two


class Disagreement(RuntimeError):
    """A result differs from the reference's."""


def with_backward(forward: Any) -> Any:
    """Return a function that runs `forward` and its backward pass, and returns outputs and gradients."""

    def run(inputs: SimpleNamespace) -> tuple[Any, ...]:
        outputs = forward(inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        grads = inputs.grads[: len(outputs)]
        leaves = [getattr(inputs, name) for name in inputs.leaves]
        # Unused: plain SDPA has no policy.
        gradients = torch.autograd.grad(outputs[: len(grads)], leaves, grads, allow_unused=True)
        return (*(output.detach() for output in outputs), *gradients)

    return run


def in_float64(inputs: SimpleNamespace) -> SimpleNamespace:
    """Return the inputs with floating-point tensors in float64."""

    def exact(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    copied = SimpleNamespace(**{name: exact(value) for name, value in vars(inputs).items()})
    copied.grads = tuple(map(exact, getattr(inputs, "grads", ())))
    return copied


def expected(case: Case, inputs: SimpleNamespace) -> tuple[Any, ...]:
    """Return the values of the reference in float64."""
    run = with_backward(case.ours) if case.training else case.ours
    torch.manual_seed(SEED)
    with tk.use_backend("reference"), torch.set_grad_enabled(case.training):
        return case.values(run(in_float64(inputs)))


def check(case: Case, inputs: SimpleNamespace, output: Any, right: tuple[Any, ...], baseline: bool) -> None:
    """Raise Disagreement unless `output` agrees with `right`, the values of `expected`."""
    values = case.values(output)
    if isinstance(right[0], tk.TokenMap):
        chosen = _checked_map(case, inputs, values[0], right[0], baseline)
        if case.op.endswith("_merge"):  # compare what was merged by this map, not by the expected one
            exact = in_float64(inputs)
            with tk.use_backend("reference"):
                right = (chosen, *tk.merge_wavg(exact.x, chosen, getattr(exact, "size", None)))
        values, right = values[1:], right[1:]
    roundings = TRAINING_ROUNDINGS if case.training else ROUNDINGS
    roundings = BASELINE_ROUNDINGS if baseline else roundings
    bound = FLOAT32_BOUND if case.dtype == "float32" else roundings * torch.finfo(case.torch_dtype).eps
    for got, wanted in zip(values, right, strict=True):
        error = float((got.double().flatten() - wanted.double().flatten()).abs().max() / wanted.abs().max())
        if not error <= bound:  # this includes NaN
            raise Disagreement(f"off by {error:.2g} of the largest value, allowed: {bound:.2g}")


def _checked_map(case: Case, inputs: SimpleNamespace, chosen: Any, right: tk.TokenMap, baseline: bool) -> tk.TokenMap:
    tokens = case.shape[1]
    if isinstance(chosen, tk.TokenMap):
        try:
            rebuilt = tk.TokenMap.from_dest(chosen.dest, chosen.num_out)
        except ValueError as error:
            raise Disagreement(str(error)) from None
        if not all(torch.equal(a, b) for a, b in zip(chosen.views(), rebuilt.views(), strict=True)):
            raise Disagreement("the map's two views differ")
    else:
        rebuilt = token_map(chosen, tokens)
    exact = case.dtype == "float32" or not baseline
    merged, wanted = tokens - rebuilt.num_out, tokens - right.num_out
    if abs(merged - wanted) > (0 if exact else BASELINE_LOSS_BOUND * wanted):
        raise Disagreement(f"{merged} tokens merged, expected {wanted}")
    metric = inputs.metric if hasattr(inputs, "metric") else inputs.x
    loss, least = _loss(metric, rebuilt) / max(merged, 1), _loss(metric, right) / max(wanted, 1)
    bound = BASELINE_LOSS_BOUND if baseline else LOSS_BOUND
    if not abs(loss - least) <= bound * least:
        raise Disagreement(f"merging loses {loss / least:.3f} times as much as with the expected map")
    if not baseline:
        same = float((rebuilt.dest == right.dest).float().mean())
        if same < SAME_SLOTS:
            raise Disagreement(f"only {same:.0%} of the tokens are in the expected slot")
    return rebuilt


def _loss(metric: Tensor, chosen: tk.TokenMap) -> float:
    """Return how much of the unit vectors of `metric` merging and unmerging loses, as a sum of squares."""
    unit = F.normalize((metric.double().mean(1) if metric.dim() == 4 else metric.double()), dim=-1)
    with tk.use_backend("reference"):
        restored = tk.unmerge(tk.merge(unit, chosen), chosen)
    return float((restored - unit).square().sum())
