# SPDX-License-Identifier: MIT
"""The CUDA kernels of rank_candidates, run on the host, against the reference backend."""

import pytest
import torch
from emulated import H100_SHARED, floats, starts, whole_numbers
from emulated_match import STREAMING_SHARED, check_best, check_match, emulated_best, random_lists

from tokred_kernels.partition import Partition, every_kth, every_other, prefix_and_rest


# Around nothing, one tile and two; then the protected tokens of every kind.
@floats
@pytest.mark.parametrize("tokens", [2, 3, 31, 197, 257, 577])
def test_rank_candidates(emulator, tokens, dtype):
    metric = whole_numbers(2, 1, tokens, 24, dtype=dtype)
    for reverse, prefix in enumerate((0, 1)):
        p = every_other(tokens, tokens, prefix, False, False)
        check_best(emulator, metric, p, reverse=bool(reverse)) if p else None


@pytest.mark.parametrize("prefix", [1, 2, 3, 5])
def test_rank_candidates_protects_the_prefix(emulator, prefix):
    check_best(emulator, whole_numbers(2, 1, 99, 8), every_other(99, 99, prefix, False, False))


def test_rank_candidates_of_one_token(emulator):
    alone = Partition(0, 2, 1, 0, 0, 0, False, 0)
    check_best(emulator, whole_numbers(2, 1, 1, 8), alone)
    check_best(emulator, whole_numbers(2, 1, 3, 8), Partition(0, 2, 2, 1, 0, 1, False, 0))  # nobody may be joined
    assert emulated_best(emulator, whole_numbers(0, 1, 1, 8), alone)[0].shape == (0, 1)


@pytest.mark.parametrize(
    ("tokens", "kept", "first"), [(2, 1, 0), (50, 20, 1), (300, 7, 0), (197, 190, 1), (1200, 700, 1)]
)
def test_rank_candidates_of_importance(emulator, tokens, kept, first):
    check_best(emulator, whole_numbers(2, 1, tokens, 8), prefix_and_rest(tokens, kept, first))


@pytest.mark.parametrize("tokens", [100, 1300])
def test_rank_candidates_of_lists_and_of_every_kth(emulator, tokens):
    check_best(emulator, whole_numbers(2, 1, tokens, 8), random_lists(2, tokens, tokens // 3, 5))
    check_best(emulator, whole_numbers(2, 1, tokens, 8), every_kth(tokens, 7, 2))


@floats
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("limit", [H100_SHARED, STREAMING_SHARED], ids=["resident", "streamed"])
def test_rank_candidates_of_heads_and_strided_rows(emulator, heads, dtype, limit):
    padded = whole_numbers(2, 300, heads, 48, dtype=dtype, scale=heads)
    metric = padded.transpose(1, 2)[..., :40]
    check_best(emulator, metric, every_other(300, 300, 1, False, False), shared_limit=limit)


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(97, torch.float32), (97, torch.float16), (97, torch.bfloat16), (1101, torch.bfloat16)],
    ids=str,
)
def test_rank_candidates_with_zero_nan_and_infinite_rows(emulator, tokens, dtype):
    metric = whole_numbers(2, 1, tokens, 16, dtype=dtype)
    metric[0, :, 3] = 0
    metric[0, :, 10] = 0
    metric[1, :, 4] = torch.nan
    metric[1, :, 7, 2] = torch.nan
    metric[1, :, 9, 1] = torch.inf
    p = every_other(tokens, tokens, 1, False, False)
    check_best(emulator, metric, p)
    if tokens < 1000:
        for value in (torch.nan, 0, 1):
            check_best(emulator, torch.full_like(metric, value), p)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        ((5, 0, 1, 2, 3, 31, 6), torch.float32),
        ((197, 64, 1), torch.float16),
        ((257, 0), torch.bfloat16),
        ((600, 3, 129), torch.float32),
        ((0, 1100, 2, 1, 700), torch.bfloat16),
    ],
    ids=str,
)
def test_rank_candidates_of_packed_images(emulator, lengths, prefix, dtype):
    metric = whole_numbers(sum(lengths), 12, dtype=dtype)
    longest = max(lengths)
    p = Partition(0, 2, (longest + 1) // 2, longest // 2, (prefix + 1) // 2, prefix // 2, prefix > 0, 0)
    check_best(emulator, metric, p, starts(lengths), reverse=prefix % 2 == 1)


@pytest.mark.parametrize("longest", [70, 1101])
def test_packed_images_are_each_what_they_are_alone(emulator, longest):
    lengths = (9, longest, 20)
    padded = torch.randn(sum(lengths), 40)
    metric = padded[:, :36]
    p = every_other(longest, longest, 1, False, False)
    got = emulated_best(emulator, metric, p, starts(lengths), offset=4)
    for image, rows in enumerate(metric.split(lengths)):
        own = p.of_tokens(len(rows))
        # In the launch that the batch took, which for a short image alone would be another.
        alone = emulated_best(emulator, rows[None, None], own)
        for ours, expected in zip(got, alone, strict=True):
            torch.testing.assert_close(ours[image, : own.num_src], expected[0], rtol=0, atol=0)


# Tokens alike, as a model's are: their products add up to much, of which the tensor cores cut a little off each time.
@pytest.mark.parametrize("limit", [H100_SHARED, STREAMING_SHARED], ids=["resident", "streamed"])
def test_float32_scores_of_many_channels_are_exact(emulator, limit):
    metric = torch.randn(1, 1, 64, 1280, generator=torch.Generator().manual_seed(5)) + 1
    score, partner, _ = emulated_best(emulator, metric, every_other(64, 64, 0, False, False), shared_limit=limit)
    unit = torch.nn.functional.normalize(metric[0, 0].double(), dim=-1)
    cosines = unit[::2] @ unit[1::2].T
    torch.testing.assert_close(
        score[0].double(), cosines.gather(1, partner.long().view(-1, 1))[:, 0], rtol=0, atol=1e-6
    )


# Above the sources that are all compared with each other: ties, protected sources, rows that are no numbers; packed.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rank_candidates_of_many_sources(emulator, dtype):
    metric = whole_numbers(2, 1, 2500, 8, dtype=dtype)
    metric[0, :, 3:6] = 0
    metric[1, :, 1000:1100] = torch.nan
    p = Partition(0, 1, 2400, 100, 3, 2, True, 0)
    check_best(emulator, metric, p, reverse=dtype == torch.float32)
    check_best(emulator, torch.ones_like(metric), p)
    check_match(emulator, metric, p._replace(r=1700))
    lengths = (4200, 0, 3, 40)
    packed = every_other(4200, 4200, 3, False, False)
    check_best(emulator, whole_numbers(sum(lengths), 4, dtype=dtype), packed, starts(lengths))


@pytest.mark.parametrize("noise", [1e-7, 1e-3, 1.0])
def test_many_sources_are_in_the_order_of_their_scores(emulator, noise):
    metric = torch.randn(1, 1, 1, 16) + noise * torch.randn(1, 1, 3010, 16)
    p = Partition(0, 1, 3000, 10, 0, 0, False, 0)
    score, _, rank = emulated_best(emulator, metric, p)
    order = score.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(rank.gather(1, order), torch.arange(3000, dtype=torch.int32)[None])


def test_more_sources_than_shared_memory_has_bins_for(emulator):
    metric = whole_numbers(1, 1, 8610, 4)
    check_best(emulator, metric, Partition(0, 1, 8600, 10, 0, 0, False, 0), shared_limit=STREAMING_SHARED)


def test_rank_candidates_refuses_float64(emulator):
    with pytest.raises(RuntimeError, match="rank_candidates: float64 is not supported on CUDA"):
        emulated_best(emulator, whole_numbers(1, 1, 8, 8, dtype=torch.float64), every_other(8, 2, None, False, False))
