# SPDX-License-Identifier: MIT
import dataclasses
import math

import pytest
import torch

import tokred_kernels as tk
from benchmarks import agreement, proofs, published_others
from benchmarks.cases import Case
from benchmarks.inputs import draw, windows
from benchmarks.providers import KERNEL_OPS, Provider, ours
from tokred_kernels.partition import every_other
from tokred_kernels.windows import Windows

TINY = Case("unmerge", "tiny", (2, 12, 5), 3, "cpu")


def proved(dest, metric, tie=1e-5, class_token=True):
    proofs.prove_choice(dest, metric, every_other(metric.shape[1], 3, None, class_token, False), tie)


@pytest.mark.parametrize("class_token", [False, True])
def test_a_right_map_is_proved(class_token):
    metric = torch.randn(2, 20, 8)
    proved(tk.bipartite_match(metric, 3, class_token=class_token).dest, metric, class_token=class_token)


@pytest.mark.parametrize(
    "wrong,words",
    [
        (lambda dest: dest.roll(1, 1), "not in its slot"),
        (lambda dest: torch.where(dest < 3, 2 - dest, dest), "not in order"),
        (lambda dest: torch.where(dest == 2, -1, dest), "nowhere"),
    ],
)
def test_a_wrong_map_is_not_proved(wrong, words):
    metric = torch.randn(1, 20, 8)
    dest = tk.bipartite_match(metric, 3, class_token=True).dest
    with pytest.raises(proofs.Disagreement, match=words):
        proved(wrong(dest), metric)


def test_a_map_of_another_metric_is_not_proved():
    with pytest.raises(proofs.Disagreement, match="similar"):
        proved(tk.bipartite_match(torch.randn(2, 20, 8), 3, class_token=True).dest, torch.randn(2, 20, 8))


# Windows

WINDOWS = Windows(2, 5, 7, 2, 3)  # four of them, a row and a column of rim; two leading tokens
MERGED = 2


def window_map(x, count=MERGED):
    return tk.window_match(x, 0.0, window=(2, 3), grid=(5, 7), num_prefix=2, count=count)


@pytest.fixture
def x():
    return torch.randn(3, 37, 8)


@pytest.fixture
def between(x):
    """A threshold that two windows of the image with the fewest reach."""
    return float(proofs.window_cosines(x, WINDOWS).sort(1).values[:, 1:3].mean(1).min())


def test_window_cosines_by_hand():
    x = torch.zeros(1, 4, 2)
    x[0] = torch.tensor([[2.0, 0], [0, 3], [1, 1], [0, 0]])  # right angles, 45 degrees, and a zero token
    expected = 2 * (0 + math.sqrt(0.5) + math.sqrt(0.5)) / 12
    assert proofs.window_cosines(x, Windows(0, 2, 2, 2, 2)).item() == pytest.approx(expected)


def test_tokens_of_windows_by_hand():
    expected = [[2, 3, 4, 9, 10, 11], [5, 6, 7, 12, 13, 14], [16, 17, 18, 23, 24, 25], [19, 20, 21, 26, 27, 28]]
    assert proofs.window_tokens(WINDOWS, torch.device("cpu")).tolist() == expected


def test_right_windows_are_proved(x, between):
    assert tk.window_match(x, between, window=(2, 3), grid=(5, 7), num_prefix=2).num_out == window_map(x).num_out
    proofs.prove_windows(window_map(x).dest, 37 - 2 * 5, x, WINDOWS, between, 1e-5)


def swapped(dest, one, other):
    return torch.where(dest == one, other, torch.where(dest == other, one, dest))


@pytest.mark.parametrize(
    "wrong,words",
    [
        (lambda dest: swapped(dest, 0, 1), "leading token"),
        (lambda dest: swapped(dest, 2, 3), "merged windows are not in order"),
        (lambda dest: swapped(dest, 8, 9), "tokens that stay are not in order"),
        (lambda dest: dest.index_fill(1, torch.tensor([29]), 3), "tokens that stay are not in order"),
        (lambda dest: dest.index_fill(1, torch.tensor([2, 5, 16, 19]), 3), "in part"),
        (lambda dest: torch.where(dest == 3, 2, dest), "not 2 windows"),
    ],
)
def test_wrong_windows_are_not_proved(x, between, wrong, words):
    with pytest.raises(proofs.Disagreement, match=words):
        proofs.prove_windows(wrong(window_map(x).dest), 27, x, WINDOWS, between, 1e-5)


def test_windows_of_other_tokens_are_not_proved(x, between):
    with pytest.raises(proofs.Disagreement, match="a window stayed that is"):
        proofs.prove_windows(window_map(torch.randn(3, 37, 8)).dest, 27, x, WINDOWS, between, 1e-5)


@pytest.mark.parametrize("count", [MERGED - 1, MERGED + 1])
def test_another_number_of_windows_is_not_proved(x, between, count):
    token_map = window_map(x, count)
    with pytest.raises(proofs.Disagreement, match=f"{count} joined, while {MERGED} to {MERGED} reach"):
        proofs.prove_windows(token_map.dest, token_map.num_out, x, WINDOWS, between, 1e-5)


def test_a_number_within_rounding_is_proved(x, between):
    token_map = window_map(x, MERGED + 1)
    proofs.prove_windows(token_map.dest, token_map.num_out, x, WINDOWS, between, 1.0)


def test_slots_that_no_number_of_windows_leaves_are_not_proved(x, between):
    with pytest.raises(proofs.Disagreement, match="no number of merged windows"):
        proofs.prove_windows(window_map(x).dest, 28, x, WINDOWS, between, 1e-5)


# Whole results


def tiny(op):
    if op == "token_attention":
        return Case(op, "tiny", (2, 26, 24), 0, "cpu", metric_dim=8, heads=3, variant="class")
    if op.startswith("lookup"):
        return Case(op, "tiny", (2, 26, 24), 5, "cpu", metric_dim=8, heads=3)
    tokens = {"window_match": 17, "window_merge": 17, "grid_bipartite_match": 16}.get(op, 26)
    return Case(op, "tiny", (2, tokens, 6), 2 if op.startswith("window") else 4, "cpu", metric_dim=8)


def checked(case, run, inputs):
    return agreement.check(case, Provider("reference", run, "reference"), inputs)


@pytest.mark.parametrize("op", list(KERNEL_OPS))
def test_wrong_results_are_found(op):
    case = tiny(op)
    inputs, other = draw(case, 0), draw(case, 1)
    right, wrong = ours(case), lambda _: right(other)
    checked(case, right, inputs)
    if op == "random_bipartite_match":
        wrong = lambda _: tk.random_bipartite_match(inputs.metric.flip(1), case.r)  # noqa: E731
    with pytest.raises(agreement.Disagreement, match=op):
        checked(case, wrong, inputs)


def test_an_adaptive_match_of_another_number_is_found():
    case = tiny("adaptive_bipartite_match")
    inputs = draw(case, 0)
    checked(case, lambda i: tk.bipartite_match(i.metric, case.r, class_token=True), inputs)
    for r in (0, case.r - 1, case.r + 1):
        with pytest.raises(agreement.Disagreement, match=f"{r} joined, while {case.r} to {case.r} reach"):
            checked(case, lambda i, r=r: tk.bipartite_match(i.metric, r, class_token=True), inputs)


def test_a_match_of_another_number_is_found():
    case = tiny("grid_bipartite_match")
    more = lambda i: tk.grid_bipartite_match(i.metric, case.r + 1, grid=case.grid)  # noqa: E731
    with pytest.raises(agreement.Disagreement, match="11 slots, not 12"):
        checked(case, more, draw(case, 0))


def test_similarities_that_are_off_are_found():
    case = tiny("importance_match")
    right = ours(case)

    def off(inputs):
        token_map, similarity = right(inputs)
        return token_map, similarity + 1e-3

    with pytest.raises(agreement.Disagreement, match="similarities returned are off by"):
        checked(case, off, draw(case, 0))


def test_destinations_off_the_corners_are_found():
    case = tiny("grid_bipartite_match")
    inputs = draw(case, 0)
    plan = published_others.grid_plan(inputs.metric, case.r, case.grid, case.window)
    published = Provider("published", lambda _: plan)
    agreement.check(case, published, inputs)
    plan = plan._replace(destinations=plan.destinations + 1)
    with pytest.raises(agreement.Disagreement, match="corners"):
        agreement.check(case, published, inputs)


@pytest.mark.parametrize("op", ["window_match", "bipartite_match"])
def test_two_views_that_differ_are_found(op):
    case = tiny(op)
    right = ours(case)

    def twisted(inputs):
        made = right(inputs)
        return tk.TokenMap._trusted(made.dest, made.num_out, made.members.flip(0), made.begin, made.count)

    with pytest.raises(agreement.Disagreement, match="two views differ"):
        checked(case, twisted, draw(case, 0))


def test_slots_out_of_range_are_found():
    case = tiny("bipartite_match")
    right = ours(case)

    def past(inputs):
        made = right(inputs)
        return tk.TokenMap._trusted(made.dest + made.num_out, made.num_out)

    with pytest.raises(agreement.Disagreement, match="dest must hold slots"):
        checked(case, past, draw(case, 0))


def test_the_drawn_number_merges():
    for op in ("window_match", "adaptive_bipartite_match"):
        case = tiny(op)
        inputs = draw(case, 3)
        gone = windows(case).size() - 1 if op == "window_match" else 1
        assert ours(case)(inputs).num_out == case.shape[1] - case.r * gone


def test_nan_is_not_agreement():
    inputs = draw(TINY, 0)
    provider = Provider("cpu", lambda i: tk.unmerge(i.y, i.token_map) * torch.nan)
    with pytest.raises(agreement.Disagreement, match="off by nan"):
        agreement.check(TINY, provider, inputs)


@pytest.mark.parametrize("training,bound", [(False, 1), (True, 2)])
def test_gradients_may_be_off_by_two_roundings(training, bound):
    case = dataclasses.replace(TINY, dtype="bfloat16", training=training)
    inputs = draw(case, 0)
    expected = agreement._expected_values(case, inputs, inputs.token_map)
    largest = expected[-1].abs().max()

    def off(roundings):
        values = (*expected[:-1], expected[-1] + roundings * 2**-7 * largest)
        agreement._check_values(
            case, Provider("cpu", None), inputs, values if training else values[0], inputs.token_map
        )

    off(bound - 0.1)
    with pytest.raises(agreement.Disagreement, match="off by"):
        off(bound + 0.1)
