# SPDX-License-Identifier: MIT
"""The cases, their lower bounds and their inputs."""

import dataclasses

import pytest

import tokred_kernels as tk
from benchmarks.families import CASES, MODEL_CASES
from benchmarks.families.attention import AttentionCase, PruneCase
from benchmarks.families.lookup import LookupCase
from benchmarks.families.match import MatchCase
from benchmarks.families.merge import MergeCase
from benchmarks.families.windows import WindowCase, window_cosines
from benchmarks.harness.case import KERNELS, Target
from benchmarks.harness.providers import providers
from tokred_kernels.ops.registry import OPS, SPECS


def test_names_are_unique():
    names = [case.name for case in (*CASES, *MODEL_CASES)]
    assert len(set(names)) == len(names)


def test_every_kernel_is_run_by_a_case():
    run = {op for case in CASES for op in KERNELS[case.op]}
    run |= {SPECS[op].backward for case in CASES if case.training for op in KERNELS[case.op]}
    assert run == set(OPS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_has_a_baseline(case):
    case = dataclasses.replace(case, device="cpu")  # nothing is drawn or run
    names = [provider.name for provider in providers(case, ["reference"], compile_baseline=False)]
    assert names[-1] == "reference"
    assert ("baseline" in names) == (case.op != "to_csr")


def test_quick_has_every_target():
    assert all(case.quick for case in (*CASES, *MODEL_CASES) if case.targets)


def test_a_target_against_the_reference_adds_the_reference():
    case = MergeCase("unmerge", "x", (2, 12, 5), 3, "cpu", targets=(Target("speedup_reference", 2),))
    assert [provider.name for provider in providers(case, ["cpu"], False)][-2:] == ["reference", "cpu"]


def test_targets_judge_the_right_side_of_the_bound():
    assert Target("speedup", 15).judge({"speedup": 15})["met"] is True
    assert Target("speedup", 15).judge({"speedup": 14.9})["met"] is False
    assert Target("median_us", 25).judge({"median_us": 25.1})["met"] is False
    assert Target("median_us", 25).judge({"median_us": None})["met"] is None
    assert str(Target("copy_share", 0.7)) == "at least 70% of the copy bandwidth"


BY_HAND = [  # case, bytes, operations
    (MergeCase("merge_wavg", "x", (1, 5, 3), 2, "cpu"), 4 * (5 * 3 + 5 + 5 + 2 * 3 + 3 * 3 + 3), 0),
    (MatchCase("bipartite_match", "x", (1, 5, 3), 2, "cpu", metric_dim=7), 4 * (5 * 7 + 10 + 2 * 3), 2 * 3 * 2 * 7),
    (WindowCase("window_merge", "x", (1, 17, 3), 2, "cpu"), 4 * (2 * 17 * 3 + 34 + 2 * 11 + 11 * 3 + 11), 0),
    # A grid of 3 x 5 has two cells and 13 sources.
    (MatchCase("grid_bipartite_match", "x", (1, 15, 3), 5, "cpu", metric_dim=7), 4 * (105 + 30 + 20), 2 * 2 * 13 * 7),
    (MatchCase("importance_match", "x", (1, 9, 3), 4, "cpu", metric_dim=7), 4 * (63 + 18 + 10 + 4), 2 * 4 * 5 * 7),
    (
        AttentionCase("token_attention", "x", (2, 7, 12), 0, "cpu", heads=3, metric_dim=4, variant="size+class"),
        4 * 2 * 7 * 12 * 4 + 2 * 2 * 7 * 4,
        2 * 2 * 2 * 3 * 7 * 7 * 4,
    ),
    (PruneCase("keep_topk", "x", (2, 9, 6), 3, "cpu"), 4 * 2 * (9 * 6 + 9 + 2 * 9 + 2 * 7 + 7 * 6), 0),
    (
        LookupCase("lookup_gather", "x", (2, 9, 12), 3, "cpu", heads=3, metric_dim=4),
        4 * 2 * (2 * 3 * 12 + 2 * 9 * 12 + 3 * 3),
        2 * 2 * 2 * 3 * 9 * 12,
    ),
    (
        LookupCase("lookup_scatter", "x", (2, 9, 12), 3, "cpu", heads=3, metric_dim=4),
        4 * 2 * (3 * 3 * 12 + 3 * 9 * 12 + 3 * 3),
        2 * 2 * 2 * 2 * 3 * 9 * 12,
    ),
]


@pytest.mark.parametrize("case,least_bytes,operations", BY_HAND, ids=[case.op for case, *_ in BY_HAND])
def test_lower_bounds_by_hand(case, least_bytes, operations):
    assert (case.least_bytes(), case.operations()) == (least_bytes, operations)


def test_training_adds_the_backward_pass():
    gather = BY_HAND[-2][0]
    training = dataclasses.replace(gather, training=True)
    few, many = 4 * 2 * 3 * 12, 4 * 2 * 9 * 12
    assert training.operations() == 7 // 2 * gather.operations() + gather.operations() // 2
    assert (gather.result_bytes(), training.result_bytes()) == (few, 2 * few + 2 * many)


def test_grids_are_as_square_as_possible():
    assert WindowCase("window_match", "x", (1, 769, 3), 4, "cpu").grid == (24, 32)
    assert MatchCase("grid_bipartite_match", "x", (1, 64, 3), 4, "cpu").grid == (8, 8)
    assert WindowCase("window_match", "x", (1, 18, 3), 4, "cpu").grid == (1, 17)


def test_window_cosines_are_those_of_the_op():
    case = WindowCase("window_match", "x", (3, 1 + 5 * 6, 8), 2, "cpu", window=(2, 3))
    inputs = case.draw(0)
    found = window_cosines(inputs.x[:, 1:], (5, 6), (2, 3))
    assert found.shape == (3, 4)
    for threshold in found[0].tolist():
        expected = int((found[:1] >= threshold).sum())
        merged = tk.window_match(inputs.x[:1], threshold - 1e-5, window=(2, 3), grid=(5, 6), num_prefix=1)
        assert merged.num_out == 31 - 5 * expected


def test_the_drawn_number_of_tokens_merges():
    window = WindowCase("window_match", "x", (2, 17, 6), 2, "cpu")
    adaptive = MatchCase("adaptive_bipartite_match", "x", (2, 26, 6), 4, "cpu", metric_dim=8)
    for case in (window, adaptive):
        assert case.ours(case.draw(3)).num_out == case.slots()
