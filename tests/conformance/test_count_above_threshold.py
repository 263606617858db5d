# SPDX-License-Identifier: MIT
import math
import statistics

import pytest
import torch
from support import slow

from tokred_kernels import backends
from tokred_kernels.ops.count_above_threshold import count_above_threshold


def call(score, threshold=0.0, divisor=0.0, own=False):
    """The counts as a list, on the backend in use."""
    counts = count_above_threshold(score, threshold, divisor, own, backends.choose("rank_candidates", score))
    assert counts.dtype == torch.int32
    return counts.tolist()


def truth(score, divisor, own):
    """ALGM's counts, by Python's own statistics."""
    images = [[s for s in row if s > -math.inf] for row in score.tolist()]
    moments = [(statistics.fmean(row), statistics.stdev(row)) for row in images]
    if not own:
        moments = [[statistics.fmean(part) for part in zip(*moments, strict=True)]] * len(images)
    return [sum(s >= mean + std / divisor for s in row) for row, (mean, std) in zip(images, moments, strict=True)]


@pytest.mark.parametrize("number", [2, 3, 17, 98, *slow(2048, 5000)])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("divisor", [1.0, 5.0, 11.5, 1e-9, 1e9])
def test_counts_above_mean_and_deviation(device, number, own, divisor):
    score = torch.rand(5, number) * torch.arange(1, 6)[:, None] / 5
    score[torch.rand(5, number) < 0.1] = -math.inf
    score[:, :2] = torch.rand(5, 2)
    assert call(score.to(device), 0.0, divisor, own) == truth(score, divisor, own)


def test_deviations_of_almost_equal_scores_are_not_lost(device):
    # Cosines of almost identical tokens: the squares of the scores agree in more digits than float32 has.
    score = 1 - torch.arange(1000)[None] * 2.0**-24
    for own in (False, True):
        assert call(score.to(device), 0.0, 1.0, own) == truth(score, 1.0, own) == [211]


def test_all_equal_scores_all_reach_their_mean(device):
    for value in (1.0, 0.1, 1 / 3, -0.7):
        for number in (2, 3, 7, 98, 1000):
            score = torch.full((3, number), value, device=device)
            assert call(score, 0.0, 2.0, True) == [number] * 3
            assert call(score, 0.0, 2.0, False) == [number] * 3


def test_a_score_equal_to_the_threshold_counts(device):
    score = torch.tensor([[0.5, 0.1, -math.inf, 0.7], [0.1, 0.1, 0.1, 0.1]], device=device)
    for own in (False, True):
        assert call(score, 0.5, own=own) == [2, 0]
        assert call(score, 0.1, own=own) == [3, 4], "the threshold is rounded to float32 as the scores are"
        assert call(score, -math.inf, own=own) == [3, 4], "what may not join never reaches a threshold"
        assert call(score, -1e300, own=own) == [3, 4]
        assert call(score, 1e300, own=own) == call(score, math.inf, own=own) == [0, 0]


def test_fewer_than_two_scores_have_no_deviation(device):
    nothing = -math.inf
    score = torch.tensor([[0.5, 0.6, 0.9], [0.5, nothing, nothing], [nothing] * 3], device=device)
    assert call(score, 0.0, 1.0, True) == [1, 0, 0]
    assert call(score, 0.0, 1.0, False) == [0, 0, 0]
    assert call(score[:1], 0.0, 1.0, False) == [1]


def test_the_divisor_is_a_float64(device):
    divisor, rounded = 0.1, torch.tensor(0.1).double()
    score = torch.randn(1, 1000)
    score[0, 0] = 0.0
    for _ in range(50):  # move the threshold to 0, where float32 has values between it and the rounded threshold
        score[:, 1:] -= score.double().mean() + score.double().std() / divisor
    for _ in range(50):
        mean, std = score.double().mean(), score.double().std()
        score[0, 0] = mean + std * (1 / divisor + 1 / rounded) / 2
    assert mean + std / rounded < score[0, 0].double() < mean + std / divisor
    assert call(score.to(device), 0.0, divisor, True) == truth(score, divisor, True)


def test_more_images_than_a_block_has_threads(device):
    score = torch.randn(300, 2)
    assert call(score.to(device), 0.0, 2.0) == truth(score, 2.0, False)


def test_reads_strided_scores(device):
    score = torch.rand(9, 4, device=device).t()
    assert call(score, 0.4) == call(score.contiguous(), 0.4)
    assert call(score[:, ::2], 0.0, 2.0) == call(score[:, ::2].contiguous(), 0.0, 2.0)


def test_no_images_and_no_scores(device):
    for divisor in (0.0, 1.0):
        assert call(torch.empty(0, 4, device=device), 0.5, divisor) == []
        assert call(torch.empty(2, 0, device=device), 0.5, divisor) == [0, 0]


def test_threads_do_not_change_the_result():
    score = torch.rand(7, 5000)
    threads = torch.get_num_threads()
    counts = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        counts.append(call(score, 0.0, 3.0))
    torch.set_num_threads(threads)
    assert counts[0] == counts[1] == counts[2]
