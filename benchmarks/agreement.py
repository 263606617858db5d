# SPDX-License-Identifier: MIT
"""What providers computed, checked before it is timed: nobody gets a time for a wrong answer.

A selector's choice is proved against cosines in float64: every token that joined, joined its most similar destination,
and those that joined are the most similar ones, up to the rounding of the dtype that the provider computes in. Values
are compared with the reference backend in float64, on one given map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokred_kernels as tk
from benchmarks import published, traffic
from benchmarks.cases import Case
from benchmarks.providers import BASELINES, CLONE, Inputs, Provider
from tokred_kernels.backends.reference.bipartite_match import best_destination, inverse_norm, tokens
from tokred_kernels.backends.reference.compose import compose
from tokred_kernels.backends.reference.invert import invert
from tokred_kernels.partition import Partition, every_kth, every_other

SEED = 20  # of the draws of random matching, so that every provider draws alike

# How far a choice may be from the best, in cosine. The kernels accumulate in float32; the published chain rounds the
# unit vectors, their norms and the products to the metric's dtype: some four roundings.
FLOAT32_TIE = 1e-5
ROUNDINGS = 4
# Relative to the largest value. The kernels round once, at the end; the published chain rounds each product and sum.
FLOAT32_VALUES = 1e-5
OURS_VALUES_EPS = 1
BASELINE_VALUES_EPS = 6


class Disagreement(RuntimeError):
    """A provider's result is not what the others, or the reference, give."""


def check(case: Case, provider: Provider, inputs: Inputs) -> Tensor | None:
    """Raise Disagreement unless the provider's results are right; returns the `dest` it chose, where it chooses."""
    if provider.name == CLONE:
        return None
    torch.manual_seed(SEED)
    with provider.scope(case.training):
        output = provider.run(inputs)
    dest = None
    if case.op.endswith("_match") or case.op == "bipartite_merge":
        dest = _check_choice(case, provider, inputs, output)
    if not case.op.endswith("_match"):
        _check_values(case, provider, inputs, output, dest)
    return dest


def _check_choice(case: Case, provider: Provider, inputs: Inputs, output: Any) -> Tensor:
    chosen = output
    if case.op == "bipartite_merge":
        chosen = output[0] if provider.name in BASELINES else output.token_map
    count, batch = case.shape[1], case.shape[0]
    if isinstance(chosen, tk.TokenMap):
        dest = chosen.dest
    else:
        dest = published.destinations(chosen, traffic.slots(case), count)
    if case.op == "kth_bipartite_match":
        partition = every_kth(count, case.r, 0)
    elif case.op == "random_bipartite_match":
        drawn = getattr(chosen, "drawn", None)
        if drawn is None:  # ours: draw the same again
            torch.manual_seed(SEED)
            order = torch.rand(batch, count, device=case.device).argsort(dim=1)
        else:
            order = torch.cat([drawn, chosen.others], 1)[..., 0]
        sources, rest = order[:, : case.r].int(), order[:, case.r :].int()
        partition = Partition(0, 1, case.r, count - case.r, 0, 0, False, case.r, sources, rest)
    else:
        partition = every_other(count, case.r, None, True, False)
        assert partition is not None  # no case asks for nothing
    # The mean over heads is rounded to the metric's dtype by everyone.
    exact = case.dtype == "float32" or (provider.name not in BASELINES and not case.heads)
    tie = FLOAT32_TIE if exact else ROUNDINGS * torch.finfo(getattr(torch, case.dtype)).eps
    try:
        prove_choice(dest, inputs.metric, partition, tie)
    except Disagreement as error:
        raise Disagreement(f"{case.name}: {provider.name}: {error}") from None
    return dest


def prove_choice(dest: Tensor, metric: Tensor, partition: Partition, tie: float) -> None:
    """Raise Disagreement unless `dest` (B, N) is a map of `partition`, its choices within `tie` of the best cosines."""
    dest, batch, lead = dest.long(), dest.shape[0], partition.protected_src
    source, destination = tokens(partition, batch, dest.device)
    best, _ = best_destination(metric, partition, torch.float64)

    j = torch.arange(partition.num_dst, device=dest.device)
    interleaved = partition.protected_dst
    slot = partition.first + torch.where(j < interleaved, 2 * j + 1, partition.num_src - partition.r + j)
    if not torch.equal(dest.gather(1, destination), slot.expand(batch, -1)):
        raise Disagreement("a destination is not in its slot")
    source_slot = dest.gather(1, source)
    if bool(((source_slot < 0) | (source_slot >= partition.num_out)).any()):
        raise Disagreement("a token goes nowhere")
    owner = dest.new_full((partition.num_out,), -1)
    owner[slot] = j
    joined = owner[source_slot]  # the destination that each source joined, -1 for none
    if not bool(((joined >= 0).sum(1) == partition.r).all()) or bool((joined[:, :lead] >= 0).any()):
        raise Disagreement(f"not {partition.r} unprotected tokens joined")

    metric = metric.double() if metric.dim() == 3 else metric.double().mean(1).to(metric.dtype).double()
    unit = metric * inverse_norm(metric)
    other = destination.gather(1, joined.clamp(min=0))
    index = torch.stack([source, other])[..., None].expand(-1, -1, -1, unit.shape[2])
    cosine = (unit.gather(1, index[0]) * unit.gather(1, index[1])).sum(-1)
    loss = torch.where(joined >= 0, best - cosine, 0.0)
    if not float(loss.max()) <= tie:
        raise Disagreement(f"a token joined one that is {float(loss.max()):.2g} less similar than the best")

    free, gone = best[:, lead:], joined[:, lead:] >= 0
    weakest = torch.where(gone, free, torch.inf).amin(1)
    strongest = torch.where(gone, -torch.inf, free).amax(1) if free.shape[1] else weakest
    if not bool((strongest <= weakest + tie).all()):
        margin = float((strongest - weakest).max())
        raise Disagreement(f"a token stayed that is {margin:.2g} more similar than one that joined")

    # Those that stay: in the order of their slots, by index, or by descending similarity.
    key = torch.where(joined < 0, source_slot, partition.num_out)
    order = key.argsort(1)[:, : partition.num_src - partition.r]
    if partition.sources_by_index:
        step = -order.diff(dim=1).double()
        tie = 0.0
    else:
        step = best.gather(1, order)[:, lead:].diff(dim=1)
    if step.numel() and not float(step.max()) <= tie:
        raise Disagreement("the tokens that stay are not in order")


def _check_values(case: Case, provider: Provider, inputs: Inputs, output: Any, dest: Tensor | None) -> None:
    got = _values(case, output)
    if case.op in ("then", "invert"):
        expected = _expected_whole(case, inputs, isinstance(output, Tensor))
        pairs = zip(got, expected, strict=True)
        if not all(torch.equal(a.to(b.dtype), b) for a, b in pairs):
            raise Disagreement(f"{case.name}: {provider.name}: another map than the reference's")
        return
    token_map = inputs.token_map if dest is None else tk.TokenMap.from_dest(dest, traffic.slots(case))
    expected = _expected_values(case, inputs, token_map)
    eps = OURS_VALUES_EPS if provider.name not in BASELINES else BASELINE_VALUES_EPS
    bound = FLOAT32_VALUES if case.dtype == "float32" else eps * torch.finfo(getattr(torch, case.dtype)).eps
    for a, b in zip(got, expected, strict=True):
        error = float((a.double().flatten() - b.flatten()).abs().max() / b.abs().max())
        if not error <= bound:  # a NaN is not, either
            raise Disagreement(f"{case.name}: {provider.name}: off by {error:.2g} of the largest, over {bound:.2g}")


def _values(case: Case, output: Any) -> tuple[Tensor, ...]:
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, tk.TokenMap):
        return (output.dest,)
    if case.op == "bipartite_merge":
        return (output.x, output.size) if isinstance(output, tk.MergeOutput) else output[1:]
    return tuple(output)


def _expected_whole(case: Case, inputs: Inputs, dense: bool) -> tuple[Tensor, ...]:
    if case.op == "invert":
        return invert(inputs.token_map.dest, inputs.token_map.num_out)
    composed = compose(inputs.token_map.dest, inputs.second_map.dest)
    return (tk.TokenMap(composed, inputs.second_map.num_out).source() if dense else composed,)


def _expected_values(case: Case, inputs: Inputs, token_map: tk.TokenMap) -> tuple[Tensor, ...]:
    unmerging = case.op == "unmerge"
    moved = (inputs.y if unmerging else inputs.x).detach().double().requires_grad_(case.training)
    with tk.use_backend("reference"), torch.set_grad_enabled(case.training):
        if unmerging:
            values = (tk.unmerge(moved, token_map),)
        elif case.op == "merge":
            values = (tk.merge(moved, token_map, reduce=case.reduce),)
        else:
            values = tk.merge_wavg(moved, token_map, inputs.size.double())
    if not case.training:
        return values
    (gradient,) = torch.autograd.grad(values[0], moved, inputs.grad.double())
    return values[0].detach(), gradient
