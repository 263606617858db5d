# SPDX-License-Identifier: MIT
"""Right results of every provider pass the check, and wrong results do not."""

import dataclasses

import pytest
import torch

import tokred_kernels as tk
from benchmarks.families import CASES
from benchmarks.harness.check import SEED, Disagreement, check, expected, in_float64
from benchmarks.harness.providers import YARDSTICKS, providers


def small(case):
    """The same case on few tokens."""
    if case.op.startswith("lookup"):
        changed = {"shape": (2, 26, 24), "r": 5, "heads": 3, "metric_dim": 8}
    elif case.op == "token_attention":
        changed = {"shape": (2, 26, 24), "heads": 3, "metric_dim": 8}
    elif case.op.startswith("window"):
        changed = {"shape": (2, 1 + 64, 6), "r": 5 if case.window == (2, 2) else 2}
    else:
        tokens = 64 if case.op == "grid_bipartite_match" else 26
        changed = {"shape": (2, tokens, 6), "r": 4, "metric_dim": 8}
    return dataclasses.replace(case, device="cpu", **changed)


SMALL = {small(case).name: small(case) for case in CASES}


def run(case, provider, inputs):
    torch.manual_seed(SEED)
    with provider.scope(case.training):
        return provider.run(inputs)


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_every_provider_is_right_and_other_inputs_are_wrong(case):
    inputs, other = case.draw(0), case.draw(1)
    right = expected(case, inputs)
    for provider in providers(case, ["reference", "cpu"], compile_baseline=False):
        if provider.name in YARDSTICKS:
            continue
        baseline = provider.backend is None
        check(case, inputs, run(case, provider, inputs), right, baseline)
        if case.op == "random_bipartite_match":  # loses as much with other draws
            continue
        with pytest.raises(Disagreement):
            check(case, inputs, run(case, provider, other), right, baseline)


def of(op, **changed):
    case = dataclasses.replace(next(case for case in SMALL.values() if case.op == op), targets=(), **changed)
    inputs = case.draw(0)
    return case, inputs, expected(case, inputs)


@pytest.mark.parametrize("output", range(6))
def test_every_output_and_gradient_is_checked(output):
    case, inputs, right = of("lookup_scatter", training=True)
    wrong = list(right)
    wrong[output] = right[output] + 1e-4 * right[output].abs().max()
    check(case, inputs, right, right, baseline=False)
    with pytest.raises(Disagreement, match="off by"):
        check(case, inputs, tuple(wrong), right, baseline=False)


def test_nan_is_wrong():
    case, inputs, right = of("unmerge")
    with pytest.raises(Disagreement, match="off by nan"):
        check(case, inputs, case.ours(inputs) * torch.nan, right, baseline=False)


@pytest.mark.parametrize("training,roundings", [(False, 1), (True, 2)])
def test_half_precision_may_round(training, roundings):
    case, inputs, right = of("unmerge", dtype="bfloat16", training=training)
    for factor in (0.9, 1.1):
        off = tuple(value + factor * roundings * 2**-7 * value.abs().max() for value in right)
        if factor < 1:
            check(case, inputs, off, right, baseline=False)
        else:
            with pytest.raises(Disagreement):
                check(case, inputs, off, right, baseline=False)


WRONG_MAPS = {
    "another number": (lambda m, i: tk.bipartite_match(i.metric, 3, class_token=True), "3 tokens merged, expected 4"),
    "another metric": (lambda m, i: tk.bipartite_match(i.metric.flip(1), 4, class_token=True), "times as much"),
    "slots": (lambda m, i: tk.TokenMap.from_dest(m.num_out - 1 - m.dest, m.num_out), "in the expected slot"),
    "out of range": (lambda m, i: tk.TokenMap._trusted(m.dest + m.num_out, m.num_out), "dest must hold slots"),
    "views": (
        lambda m, i: tk.TokenMap._trusted(m.dest, m.num_out, m.members.flip(0), m.begin, m.count),
        "two views differ",
    ),
}


@pytest.mark.parametrize("wrong,message", WRONG_MAPS.values(), ids=WRONG_MAPS)
def test_wrong_maps_are_found(wrong, message):
    case, inputs, right = of("bipartite_match", dtype="float32", heads=0)
    right_map = case.ours(inputs)
    right_map.views()
    check(case, inputs, right_map, right, baseline=False)
    with pytest.raises(Disagreement, match=message):
        check(case, inputs, wrong(right_map, inputs), right, baseline=False)


def test_merged_values_are_checked_on_the_map_that_was_chosen():
    case, inputs, right = of("bipartite_merge", dtype="float32")
    output = case.ours(inputs)
    check(case, inputs, output, right, baseline=False)
    with pytest.raises(Disagreement, match="off by"):
        check(case, inputs, output._replace(x=output.x + 1e-3), right, baseline=False)


def test_float64_inputs_keep_what_needs_a_gradient():
    _, inputs, _ = of("token_attention", training=True)
    exact = in_float64(inputs)
    assert exact.q.dtype == torch.float64 and exact.q.requires_grad
    assert [grad.dtype for grad in exact.grads] == [torch.float64] * len(inputs.grads)
