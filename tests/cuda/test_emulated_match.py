# SPDX-License-Identifier: MIT
"""The CUDA kernels of bipartite_match, run on the host, against the reference backend."""

import pytest
import torch
from emulated import DTYPES, H100_SHARED, SMALL_SHARED, assert_map, floats, whole_numbers
from emulated_match import (
    ALL,
    NONE,
    SOURCES,
    STREAMING_SHARED,
    check_best,
    check_match,
    emulated_match,
    match_problem,
    random_lists,
)

from tokred_kernels.partition import Partition, every_kth, every_other


# Around nothing, one tile (256 tokens) and two; a ViT's own sizes, with and without a distillation token.
@floats
@pytest.mark.parametrize("tokens", [2, 3, 31, 197, 198, 256, 257])
def test_match(emulator, tokens, dtype):
    metric = whole_numbers(2, 1, tokens, 24, dtype=dtype)
    for reverse, r in enumerate((tokens // 8 + 1, tokens // 2)):
        check_match(emulator, metric, every_other(tokens, r, None, False, False), reverse=bool(reverse))


def test_match_of_every_r(emulator):
    metric = whole_numbers(1, 1, 21, 8)
    for r in range(1, 11):
        check_match(emulator, metric, every_other(21, r, None, False, False), reverse=r % 2 == 1)


@floats
@pytest.mark.parametrize("tokens", [577, 1024])
def test_match_of_several_tiles(emulator, tokens, dtype):
    metric = whole_numbers(1, 1, tokens, 16, dtype=dtype)
    check_match(emulator, metric, every_other(tokens, tokens // 8, None, True, False))


# One element, less than a load, just over one, over a chunk; and rows that no load of 16 bytes can read.
@floats
@pytest.mark.parametrize("channels", [1, 7, 33, 64, 200])
@pytest.mark.parametrize("limit", [H100_SHARED, STREAMING_SHARED], ids=["resident", "streamed"])
def test_match_channels(emulator, channels, dtype, limit):
    tokens = 300
    metric = whole_numbers(1, 1, tokens, channels, dtype=dtype)
    check_match(emulator, metric, every_other(tokens, 40, None, False, False), shared_limit=limit)


def test_a_wide_metric_is_streamed_in_one_launch(emulator):
    p = every_other(197, 16, None, True, False)
    metric = whole_numbers(1, 1, 197, 1280, dtype=torch.bfloat16)
    fused, resident, *_ = emulator.call("match_config", (*match_problem(metric, p), H100_SHARED), [None] * 4)
    assert (fused, resident) == (1, NONE)
    check_match(emulator, metric, p)


@floats
@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("limit", [H100_SHARED, STREAMING_SHARED], ids=["resident", "streamed"])
def test_match_averages_heads(emulator, heads, dtype, limit):
    metric = whole_numbers(2, heads, 300, 40, dtype=dtype, scale=heads)  # multiples, so that the mean is exact too
    check_match(emulator, metric, every_other(300, 20, None, False, False), shared_limit=limit)


def test_match_rounds_the_mean_over_heads(emulator):
    metric = torch.randn(1, 3, 64, 8).to(torch.bfloat16)
    rounded = metric.float().mean(1).to(torch.bfloat16)
    p = every_other(64, 16, None, False, False)
    averaged = emulated_match(emulator, metric, p)
    assert_map(averaged, emulated_match(emulator, rounded[:, None], p)[0], p.num_out())


@floats
@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5])
def test_match_protects_the_prefix(emulator, prefix, dtype):
    metric = whole_numbers(2, 1, 99, 8, dtype=dtype)
    for r in (1, 99):
        check_match(emulator, metric, every_other(99, r, prefix, False, False))


@pytest.mark.parametrize("distill_token", [False, True])
@pytest.mark.parametrize("class_token", [False, True])
def test_match_protects_class_and_distillation(emulator, class_token, distill_token):
    metric = whole_numbers(2, 1, 198, 8)
    for r in (1, 50, 200):
        check_match(emulator, metric, every_other(198, r, None, class_token, distill_token))


@pytest.mark.parametrize(
    ("tokens", "k", "prefix"), [(1, 1, 0), (7, 2, 0), (50, 3, 1), (64, 8, 0), (10, 1, 2), (5, 9, 0)]
)
def test_match_of_every_kth(emulator, tokens, k, prefix):
    check_match(emulator, whole_numbers(2, 1, tokens, 8), every_kth(tokens, k, prefix))


@pytest.mark.parametrize(("num_src", "r"), [(20, 20), (70, 31), (99, 99), (0, 0)])
@pytest.mark.parametrize("by_index", [False, True])
def test_match_of_lists(emulator, num_src, r, by_index):
    p = random_lists(3, 100, num_src, r, by_index=by_index)
    check_match(emulator, whole_numbers(3, 1, 100, 8), p)


def test_match_without_anything_to_join(emulator):
    for tokens in (1, 2):
        p = Partition(0, 2, tokens - tokens // 2, tokens // 2, 0, tokens // 2, False, 0)
        check_match(emulator, whole_numbers(1, 1, tokens, 8), p)
    assert emulated_match(emulator, whole_numbers(0, 1, 4, 8), Partition(0, 2, 2, 2, 0, 0, False, 1))[0].shape == (0, 4)


@floats
def test_match_with_zero_and_nan_rows(emulator, dtype):
    metric = whole_numbers(2, 1, 97, 16, dtype=dtype)
    metric[0, :, 3] = 0
    metric[0, :, 10] = 0
    metric[1, :, 4] = torch.nan
    metric[1, :, 7, 2] = torch.nan
    metric[1, :, 9, 1] = torch.inf
    for r in (1, 30, 48):
        check_match(emulator, metric, every_other(97, r, None, False, False))
    check_match(emulator, torch.full_like(metric, torch.nan), every_other(97, 30, None, True, False))
    check_match(emulator, torch.zeros_like(metric), every_other(97, 30, None, False, False))
    check_match(emulator, torch.ones_like(metric), every_other(97, 30, None, False, True))


@floats
@pytest.mark.parametrize("offset", [0, 4])
def test_match_of_strided_rows(emulator, dtype, offset):
    padded = whole_numbers(2, 50, 2, 40, dtype=dtype)
    metric = padded.transpose(1, 2)[..., : 32 + offset]  # (B, H, N, D), as queries and keys come out of one projection
    check_match(emulator, metric, every_other(50, 9, None, True, False), offset=offset)


# Two tiles of sources and destinations, and three; mean of heads; (images, tokens, heads, channels) of bfloat16.
@pytest.mark.parametrize(
    "sizes,fused",
    [
        ((2, 1024, 1, 640), False),
        ((66, 577, 1, 1024), False),
        ((67, 577, 1, 1024), True),
        ((8, 593, 1, 384), False),
        ((1, 300, 4, 448), False),
        # All of the image stays in shared memory; one tile; too few bytes.
        ((1, 577, 16, 64), True),
        ((1, 197, 1, 1280), True),
        ((1, 300, 1, 448), True),
    ],
)
def test_few_images_that_are_streamed_are_spread_over_blocks(emulator, sizes, fused):
    images, tokens, heads, channels = sizes
    p = every_other(tokens, tokens // 4, None, False, False)
    problem = (0, 0, channels, images, heads, tokens, channels, DTYPES[torch.bfloat16], *map(int, p[:8]))
    got, resident, *_ = emulator.call("match_config", (*problem, H100_SHARED), [None] * 4)
    assert got == fused and (resident == ALL) == (heads == 16)


def test_match_of_an_image_that_is_spread_over_blocks(emulator):
    p = every_other(577, 100, None, True, False)
    metric = whole_numbers(1, 1, 577, 153)
    fused, *_ = emulator.call("match_config", (*match_problem(metric, p), H100_SHARED), [None] * 4)
    assert not fused
    check_match(emulator, metric, p)
    check_best(emulator, metric, p)


# Above the fused sizes: one block of ranks and several, cursors in shared memory and in the result itself.
@pytest.mark.parametrize(
    ("tokens", "by_index", "dtype"),
    [(1101, False, torch.float32), (1101, True, torch.float16), (1300, True, torch.bfloat16)],
    ids=str,
)
def test_match_in_three_launches(emulator, tokens, by_index, dtype):
    metric = whole_numbers(2, 1, tokens, 8, dtype=dtype)
    p = every_other(tokens, tokens // 4, None, by_index, by_index)
    fused, _, _, splits, workspace = emulator.call("match_config", (*match_problem(metric, p), H100_SHARED), [None] * 4)
    assert not fused and splits > 1 and workspace > 0
    check_match(emulator, metric, p)


# Less than a chunk of 128 bytes, just that, several; the sources of a tile stay, or nothing does.
@pytest.mark.parametrize(
    ("channels", "heads", "dtype"),
    [
        (0, 1, torch.float32),
        (1, 1, torch.float16),
        (33, 2, torch.float32),
        (64, 1, torch.bfloat16),
        (200, 1, torch.float32),
        (200, 3, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("limit", [H100_SHARED, STREAMING_SHARED], ids=["sources stay", "nothing stays"])
def test_match_channels_in_three_launches(emulator, channels, heads, dtype, limit):
    tokens = 1101
    p = random_lists(1, tokens, 300, 90)
    metric = whole_numbers(1, heads, tokens, channels, dtype=dtype, scale=heads)
    fused, resident, *_ = emulator.call("match_config", (*match_problem(metric, p), limit), [None] * 4)
    assert (fused, resident) == (0, NONE if channels == 200 and limit == STREAMING_SHARED else SOURCES)
    check_match(emulator, metric, p, shared_limit=limit, reverse=channels == 64)


def test_match_in_three_launches_of_lists_and_long_maps(emulator):
    check_match(emulator, whole_numbers(2, 1, 1200, 8), random_lists(2, 1200, 200, 150))
    check_match(emulator, whole_numbers(1, 1, 1200, 8), every_kth(1200, 7, 2))
    metric = whole_numbers(1, 1, 1100, 8)
    metric[:, :, 100:120] = torch.nan
    check_match(emulator, metric, every_other(1100, 500, 3, False, False))
    # Slots of many blocks, few of them to be matched.
    check_match(emulator, whole_numbers(1, 1, 13_000, 8), Partition(12_800, 2, 100, 100, 0, 0, True, 60))


@floats
@pytest.mark.parametrize("limit", [H100_SHARED, STREAMING_SHARED], ids=["resident", "streamed"])
def test_match_of_random_metrics_is_right_up_to_near_ties(emulator, dtype, limit):
    tokens, r = 259, 60
    metric = torch.randn(2, 1, tokens, 100).to(dtype)
    p = every_other(tokens, r, None, False, False)
    dest = emulated_match(emulator, metric, p, shared_limit=limit)[0].long()
    a, b = metric[:, 0, ::2].double(), metric[:, 0, 1::2].double()
    scores = torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).transpose(1, 2)
    slack = 4e-6  # float32 sums of 100 products, each operand cut to 22 bits when the metric is float32
    unmerged = p.num_src - r
    for image in range(2):
        slot = dest[image, ::2]
        joins = slot >= unmerged
        assert joins.sum() == r
        best = scores[image].max(1).values
        chosen = scores[image].gather(1, (slot - unmerged).clamp(min=0)[:, None])[:, 0]
        assert (chosen[joins] >= best[joins] - slack).all()
        assert best[joins].min() >= best[~joins].max() - slack
        in_order = best[~joins][slot[~joins].argsort()]
        assert (in_order[:-1] >= in_order[1:] - slack).all()


def test_match_refuses_float64(emulator):
    with pytest.raises(RuntimeError, match="bipartite_match: float64 is not supported on CUDA"):
        emulated_match(emulator, whole_numbers(1, 1, 8, 8, dtype=torch.float64), every_other(8, 2, None, False, False))


def test_match_fits_shared_memory(emulator):
    for limit in (SMALL_SHARED, 163 * 1024, H100_SHARED):
        for tokens in (1, 197, 577, 1024, 1088, 1089, 4096, 65_536):
            for channels in (1, 64, 80, 384, 1280):
                for dtype in DTYPES.values():
                    p = (0, 2, tokens - tokens // 2, tokens // 2, 0, 0, 0, tokens // 4)
                    problem = (0, 0, channels, 67, 1, tokens, channels, dtype, *p)  # as many images as use one block
                    fused, resident, shared, splits, workspace = emulator.call(
                        "match_config", (*problem, limit), [None] * 4
                    )
                    assert shared <= limit
                    assert fused == (tokens <= 1088)
                    assert (workspace == 0) == bool(fused)
                    assert splits >= 1 and resident != (SOURCES if fused else ALL)
