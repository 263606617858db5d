# SPDX-License-Identifier: MIT
import math

import pytest
import torch
from support import COSINE_BAND, DTYPES, exact_tokens, slow, window_members, window_scores

from tokred_kernels import backends
from tokred_kernels.ops.window_similarity import window_similarity
from tokred_kernels.windows import Windows


def call(x, windows, threshold=0.0):
    """Scores and counts, on the backend in use."""
    return window_similarity(x, windows, threshold, backends.choose("window_similarity", x))


def tokens_for(windows, channels, batch=2):
    return torch.randn(batch, windows.num_tokens(), channels)


# One window and many, in a row and in a column, the whole grid, a rim below, at the right and both, no prefix and some.
SHAPES = [
    Windows(0, 1, 2, 1, 2),
    Windows(2, 6, 5, 2, 1),
    Windows(5, 7, 9, 2, 2),
    Windows(1, 5, 3, 5, 3),
    *slow(*((w,) for w in (Windows(1, 14, 14, 2, 2), Windows(0, 9, 10, 3, 3), Windows(1, 9, 7, 4, 2)))),
    Windows(1, 3, 22, 2, 7),
]


@pytest.mark.parametrize("windows", SHAPES, ids=str)
@pytest.mark.parametrize("channels", [1, 33, *slow(64, 385)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_is_the_mean_of_all_pairs(device, windows, channels, dtype):
    x = tokens_for(windows, channels).to(dtype)
    x[:, windows.first] = 0
    members = window_members(windows.first, windows[1:3], windows[3:])
    exact = torch.tensor([window_scores(image, members) for image in x])
    score, counts = call(x.to(device), windows, 0.01)
    assert score.shape == (2, windows.number())
    assert score.dtype == torch.float32
    assert counts.dtype == torch.int32
    assert (score.cpu() - exact).abs().max() <= COSINE_BAND
    assert torch.equal(counts, (score >= 0.01).sum(1).int())


# At and past the blocks of kernels, and past the largest.
@pytest.mark.parametrize("channels", [129, 385, 1025, *slow(257, 1024, 2048, 2049, 4500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_channels(device, channels, dtype):
    windows = Windows(1, 3, 4, 3, 2)
    x = torch.randn(2, 13, channels).to(dtype)
    exact = torch.tensor([window_scores(image, window_members(1, (3, 4), (3, 2))) for image in x])
    assert (call(x.to(device), windows)[0].cpu() - exact).abs().max() <= COSINE_BAND


@pytest.mark.backends("cpu", "cuda", "triton")
def test_rows_further_apart_than_32_bits_count(device, far_rows):
    far_rows.copy_(torch.eye(4)[[0, 0, 1, 2, 2]])
    assert call(far_rows[None], Windows(1, 2, 2, 1, 2))[0].tolist() == [[0.0, 1.0]]
    assert call(far_rows[None], Windows(1, 4, 1, 2, 1))[0].tolist() == [[0.0, 1.0]]
    apart = far_rows.stride(0)
    images = far_rows.as_strided((4, 2, 4), (apart, apart, 1))  # of two rows each, the second the next one's first
    assert call(images, Windows(0, 1, 2, 1, 2))[0].tolist() == [[1.0], [0.0], [0.0], [1.0]]


def test_equal_scores_are_equal_bits(device):
    # Windows whose sums of cosines are the same whole number must tie, or the lower index does not win.
    windows = Windows(1, 16, 16, 2, 2)
    x = exact_tokens(2, windows.num_tokens(), 16)
    exact = torch.tensor([window_scores(image, window_members(1, (16, 16), (2, 2))) for image in x])
    for dtype in DTYPES:
        score = call(x.to(device, dtype), windows)[0].cpu()
        order = exact.argsort(dim=1, stable=True)
        ranked, found = exact.gather(1, order), score.gather(1, order)
        assert torch.equal(ranked.diff() > 1e-9, found.diff() > 0)
        assert (found.diff() >= 0).all()


def test_a_window_at_the_threshold_reaches_it(device):
    x = torch.ones(1, 4, 4, device=device)
    x[0, 3, :2] = -1
    x[0, 2, 0] = -1
    score, counts = call(x, Windows(0, 2, 2, 1, 2), 0.5)
    assert score.tolist() == [[1, 0.5]]
    assert counts.tolist() == [2]
    assert call(x, Windows(0, 2, 2, 1, 2), 0.5000001)[1].tolist() == [1]
    assert call(x * 0.3, Windows(0, 2, 2, 1, 2), 0.1)[1].tolist() == [2]


@pytest.mark.parametrize("window", [(1, 2), (2, 2), (3, 3), (4, 2)])
def test_identical_tokens_have_similarity_one(device, window):
    x = torch.full((1, 144, 64), 0.5, device=device)
    score, counts = call(x, Windows(0, 12, 12, *window), 1.0)
    assert (score == 1).all()
    assert counts.tolist() == [score.shape[1]]


def test_zero_tokens_have_similarity_zero(device):
    x = torch.zeros(1, 8, 3, device=device)
    x[0, 0] = x[0, 1] = torch.tensor([2.0, 0.0, 0.0])
    x[0, 4] = 1e-20  # its square is subnormal
    score, counts = call(x, Windows(0, 2, 4, 2, 2), 0.0)
    torch.testing.assert_close(score, torch.tensor([[1 / 6, 0.0]], device=device))
    assert counts.tolist() == [2]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whole", [False, True])
def test_a_token_that_is_not_finite_affects_its_own_window_only(device, value, whole):
    windows = Windows(1, 5, 7, 2, 2)
    x = torch.randn(1, windows.num_tokens(), 24, device=device)
    expected = call(x, windows)[0]
    spoilt = (0, 1 + 9, 1 + 6, 1 + 34)  # of the prefix, of window 1, of the rim at the right, of the one below
    for token in spoilt:
        x[0, token, slice(None) if whole else 5] = value
    score, counts = call(x, windows, -math.inf)
    assert score[0, 1] == -math.inf
    assert torch.equal(score[0, [0, 2, 3, 4, 5]], expected[0, [0, 2, 3, 4, 5]])
    assert counts.tolist() == [5], "such a window reaches no threshold"
    assert call(x, windows, -1e300)[1].tolist() == [5]


def test_squared_norms_of_half_precision_do_not_overflow(device):
    windows = Windows(0, 4, 4, 2, 2)
    x = (tokens_for(windows, 64) * 2000).half()
    exact = torch.tensor([window_scores(image, window_members(0, (4, 4), (2, 2))) for image in x])
    assert (call(x.to(device), windows)[0].cpu() - exact).abs().max() <= COSINE_BAND


def test_reads_strided_tokens(device):
    windows = Windows(1, 3, 4, 2, 2)
    base = torch.randn(3, 13, 2, 16, device=device)
    transposed = torch.randn(3, 16, 13, device=device).transpose(1, 2)
    images_last = torch.randn(13, 3, 16, device=device).transpose(0, 1)
    alike = torch.randn(1, 13, 16, device=device).expand(3, 13, 16)
    for x in (base[:, :, 1], base[:, :, 0, ::2], transposed, images_last, alike, base[:, :, 0, 3:]):
        for got, want in zip(
            call(x, windows), call(x.clone(memory_format=torch.contiguous_format), windows), strict=True
        ):
            assert torch.equal(got, want)


def test_empty_batch_and_no_channels(device):
    windows = Windows(1, 2, 4, 2, 2)
    assert [tuple(part.shape) for part in call(torch.randn(0, 9, 4, device=device), windows)] == [(0, 2), (0,)]
    score, counts = call(torch.randn(3, 9, 0, device=device), windows)
    assert (score == 0).all()
    assert counts.tolist() == [2, 2, 2]
    none = call(torch.randn(2, 9, 4, device=device), Windows(1, 2, 4, 3, 2))
    assert [part.tolist() for part in none] == [[[], []], [0, 0]]


@pytest.mark.slow
def test_threads_and_other_images_change_no_bit(device):
    windows = Windows(1, 24, 24, 2, 2)
    x = tokens_for(windows, 384, batch=3).to(device)
    threads = torch.get_num_threads()
    runs = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        runs.append(call(x, windows))
    torch.set_num_threads(threads)
    runs.append([torch.cat(parts) for parts in zip(*(call(image[None], windows) for image in x), strict=True)])
    for run in runs[1:]:
        for got, want in zip(run, runs[0], strict=True):
            assert torch.equal(got, want)
