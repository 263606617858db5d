# SPDX-License-Identifier: MIT
"""What providers computed, checked before it is timed: nobody gets a time for a wrong answer.

A selector's choice is proved against cosines in float64; see proofs.py. Values are compared with the reference backend
in float64, on one given map.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import tokred_kernels as tk
from benchmarks import published, traffic
from benchmarks.cases import WINDOW_OPS, Case
from benchmarks.families import family
from benchmarks.inputs import Inputs, every_other_source, windows
from benchmarks.proofs import Disagreement, best_cosines, prove_adaptive_count, prove_choice, prove_windows
from benchmarks.providers import BASELINES, YARDSTICKS, Provider
from tokred_kernels.backends.reference.compose import compose
from tokred_kernels.backends.reference.to_csr import to_csr
from tokred_kernels.partition import Partition, every_kth, prefix_and_rest

SEED = 20  # of the draws of random matching, so that every provider draws alike

# How far a choice may be from the best, in cosine. The kernels accumulate in float32; the published chain rounds the
# unit vectors, their norms and the products to the metric's dtype: some four roundings.
FLOAT32_TIE = 1e-5
ROUNDINGS = 4
# Relative to the largest value. The kernels round once, at the end; the published chain rounds each product and sum.
# Gradients are of what the forward pass has rounded, and there are many more of them for one to be the worst.
FLOAT32_VALUES = 1e-5
OURS_VALUES_EPS, OURS_TRAINING_EPS = 1, 2
BASELINE_VALUES_EPS = 6

COMPOSITES = ("bipartite_merge", "window_merge")  # a selector and a merge in one


def check(case: Case, provider: Provider, inputs: Inputs) -> Tensor | None:
    """Raise Disagreement unless the provider's results are right; returns the `dest` it chose, where it chooses."""
    if provider.name in YARDSTICKS:
        return None
    torch.manual_seed(SEED)
    with provider.scope(case.training):
        output = provider.run(inputs)
    token_map = getattr(inputs, "token_map", None)
    chooses = case.op.endswith("_match") or case.op in COMPOSITES
    try:
        if chooses:
            token_map = _check_choice(case, provider, inputs, output)
        if not case.op.endswith("_match"):
            _check_values(case, provider, inputs, output, token_map)
    except Disagreement as error:
        raise Disagreement(f"{case.name}: {provider.name}: {error}") from None
    return token_map.dest if chooses else None


def _check_choice(case: Case, provider: Provider, inputs: Inputs, output: Any) -> tk.TokenMap:
    """The map that was chosen, rebuilt from its `dest` alone, if it is right."""
    baseline = provider.name in BASELINES
    chosen = output
    if case.op in COMPOSITES:
        chosen = output[0] if baseline else output.token_map
    elif case.op == "importance_match":
        chosen = output[0]
    token_map = _rebuilt(case, chosen)
    # The mean over heads is rounded to the metric's dtype by everyone.
    exact = case.dtype == "float32" or not (baseline or case.heads)
    tie = FLOAT32_TIE if exact else ROUNDINGS * torch.finfo(getattr(torch, case.dtype)).eps
    if case.op in WINDOW_OPS:
        prove_windows(token_map.dest, token_map.num_out, inputs.x, windows(case), inputs.threshold, tie)
        return token_map
    r = case.shape[1] - token_map.num_out
    if case.op == "adaptive_bipartite_match":
        prove_adaptive_count(r, inputs.metric, every_other_source(case, case.r), inputs.layer_index, tie)
    partition = _partition(case, chosen, r)
    if token_map.num_out != partition.num_out():
        raise Disagreement(f"{token_map.num_out} slots, not {partition.num_out()}")
    prove_choice(token_map.dest, inputs.metric, partition, tie)
    if case.op == "importance_match":
        off = float((output[1].double() - best_cosines(inputs.metric, partition)).abs().max())
        if not off <= tie:
            raise Disagreement(f"the similarities returned are off by {off:.2g}")
    return token_map


def _rebuilt(case: Case, chosen: Any) -> tk.TokenMap:
    count = case.shape[1]
    if isinstance(chosen, tk.TokenMap):
        try:
            token_map = tk.TokenMap.from_dest(chosen.dest, chosen.num_out)
        except ValueError as error:
            raise Disagreement(str(error)) from None
        expected = to_csr(chosen.dest, chosen.num_out)
        if not all(torch.equal(got, right) for got, right in zip(chosen.views(), expected, strict=True)):
            raise Disagreement("the map's two views differ")
        return token_map
    slots = traffic.slots(case) if case.op == "kth_bipartite_match" else count - chosen.joined.shape[1]
    return tk.TokenMap.from_dest(published.destinations(chosen, slots, count), slots)


def _partition(case: Case, chosen: Any, r: int) -> Partition:
    """Who may join whom, when the provider has merged `r` tokens; an adaptive number of them, or the case's own."""
    batch, count, _ = case.shape
    if case.op == "kth_bipartite_match":
        return every_kth(count, case.r, 0)
    if case.op == "random_bipartite_match":
        drawn = getattr(chosen, "drawn", None)
        if drawn is None:  # ours: draw the same again
            torch.manual_seed(SEED)
            order = torch.rand(batch, count, device=case.device).argsort(dim=1)
        else:
            order = torch.cat([drawn, chosen.others], 1)[..., 0]
        return _listed(order[:, : case.r], order[:, case.r :], case.r)
    if case.op == "grid_bipartite_match":
        return _grid_partition(case, chosen)
    if case.op == "importance_match":
        return prefix_and_rest(count, count - case.r, case.prefix)
    return every_other_source(case, r if case.op == "adaptive_bipartite_match" else case.r)


def _grid_partition(case: Case, chosen: Any) -> Partition:
    (height, width), (down, across) = case.grid, case.window
    token = torch.arange(height * width, device=case.device)
    corner = torch.zeros(height, width, dtype=torch.bool, device=case.device)
    corner[: height - down + 1 : down, : width - across + 1 : across] = True
    sources, destinations = token[~corner.flatten()], token[corner.flatten()]
    if not isinstance(chosen, tk.TokenMap):
        # The published order of slots is that of an unstable sort: as the plan has it, if they are the right tokens.
        drawn, others = chosen.destinations.flatten(), chosen.sources.flatten()
        if not (torch.equal(drawn.sort()[0], destinations) and torch.equal(others.sort()[0], sources)):
            raise Disagreement("the destinations are not the corners of the cells")
        sources, destinations = others, drawn
    batch = case.shape[0]
    return _listed(sources.expand(batch, -1), destinations.expand(batch, -1), min(case.r, sources.numel()))


def _listed(sources: Tensor, destinations: Tensor, r: int) -> Partition:
    lists = sources.int(), destinations.int()
    return Partition(0, 1, sources.shape[1], destinations.shape[1], 0, 0, False, r, *lists)


def _check_values(case: Case, provider: Provider, inputs: Inputs, output: Any, token_map: tk.TokenMap) -> None:
    got = _values(case, output)
    if case.op in ("then", "to_csr"):
        expected = _expected_whole(case, inputs, isinstance(output, Tensor))
        pairs = zip(got, expected, strict=True)
        if not all(torch.equal(a.to(b.dtype), b) for a, b in pairs):
            raise Disagreement("another map than the reference's")
        return
    own = family(case)
    expected = own.expected(case, inputs) if own is not None else _expected_values(case, inputs, token_map)
    ours = OURS_TRAINING_EPS if case.training else OURS_VALUES_EPS
    eps = ours if provider.name not in BASELINES else BASELINE_VALUES_EPS
    bound = FLOAT32_VALUES if case.dtype == "float32" else eps * torch.finfo(getattr(torch, case.dtype)).eps
    for a, b in zip(got, expected[: len(got)], strict=True):
        error = float((a.double().flatten() - b.flatten()).abs().max() / b.abs().max())
        if not error <= bound:  # a NaN is not, either
            raise Disagreement(f"off by {error:.2g} of the largest, over {bound:.2g}")


def _values(case: Case, output: Any) -> tuple[Tensor, ...]:
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, tk.TokenMap):
        return (output.dest,)
    if case.op in COMPOSITES:
        return (output.x, output.size) if isinstance(output, tk.MergeOutput) else output[1:]
    return tuple(output)


def _expected_whole(case: Case, inputs: Inputs, dense: bool) -> tuple[Tensor, ...]:
    if case.op == "to_csr":
        return to_csr(inputs.token_map.dest, inputs.token_map.num_out)
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
            values = tk.merge_wavg(moved, token_map, None if inputs.size is None else inputs.size.double())
    if not case.training:
        return values
    (gradient,) = torch.autograd.grad(values[0], moved, inputs.grad.double())
    return values[0].detach(), gradient
