# SPDX-License-Identifier: MIT
"""The similarity of windows in Triton against the reference; conftest.py says where it runs."""

import math

import pytest
import torch
from support import COSINE_BAND, DTYPES, assert_views, exact_tokens

import tokred_kernels as tk
from tokred_kernels.backends.reference.window_similarity import mean_cosine
from tokred_kernels.ops.window_similarity import window_similarity
from tokred_kernels.windows import Windows


def assert_close_to_float64(x, windows):
    score, counts = window_similarity(x, windows, 0.1, "triton")
    assert score.dtype == torch.float32
    assert (score - mean_cosine(x.double(), windows, torch.float64)).abs().max() <= COSINE_BAND
    assert counts.dtype == torch.int32
    assert torch.equal(counts, (score >= 0.1).sum(1).int())


# Two tokens in a row and in a column, ToMe's and ALGM's square, as many tokens as are under way at once and one more,
# the whole grid; a rim below, at the right and both; no prefix and some; one window, and more than a program has.
SHAPES = [
    Windows(0, 1, 2, 1, 2),
    Windows(2, 4, 3, 2, 1),
    Windows(1, 4, 6, 2, 2),
    Windows(5, 5, 7, 2, 2),
    Windows(0, 3, 10, 3, 3),
    Windows(1, 1, 11, 1, 5),
    Windows(1, 5, 7, 5, 7),
]


@pytest.mark.parametrize("windows", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_mean_of_all_pairs(device, windows, dtype):
    for channels in (1, 33, 130):
        x = torch.randn(2, windows.num_tokens(), channels, device=device).to(dtype)
        x[:, windows.first] = 0
        assert_close_to_float64(x, windows)


# At and past the block of each config, and past the largest, where the norms come first.
@pytest.mark.parametrize("channels", [128, 129, 257, 1024, 1025, 2048, 2049, 4500])
def test_any_number_of_channels(device, channels):
    for dtype in (torch.float32, torch.bfloat16):
        assert_close_to_float64(torch.randn(2, 13, channels, device=device).to(dtype), Windows(1, 3, 4, 3, 2))


@pytest.mark.parametrize("windows", SHAPES, ids=str)
def test_norms_that_come_first_are_the_same(device, windows, monkeypatch):
    from tokred_kernels.backends.triton import window_similarity as module
    from tokred_kernels.backends.triton.configs import WindowConfig

    x = exact_tokens(2, windows.num_tokens(), 64).to(device)
    expected = window_similarity(x, windows, 0.0, "triton")
    monkeypatch.setattr(module, "window_config", lambda _: WindowConfig(2, 16, 4, 1))
    for got, want in zip(window_similarity(x, windows, 0.0, "triton"), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_rounding_does_not_touch_is_equal_in_every_bit(device, dtype):
    # Cosines are whole multiples of 1 / 8, and most windows tie with others; some tokens are zero.
    windows = Windows(1, 5, 12, 2, 2)
    x = exact_tokens(3, windows.num_tokens(), 16).to(device, dtype)
    for threshold in (0.0, 1 / 12):
        got = window_similarity(x, windows, threshold, "triton")
        # On the CPU: a GPU's torch may round a norm or a quotient differently.
        for one, other in zip(got, window_similarity(x.cpu(), windows, threshold, "reference"), strict=True):
            assert torch.equal(one.cpu(), other)
    ones = torch.full_like(x, 0.5)
    score, counts = window_similarity(ones, windows, 1.0, "triton")
    assert (score == 1).all()
    assert counts.tolist() == [12] * 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_own_window_alone(device, value):
    windows = Windows(1, 5, 7, 2, 2)
    x = torch.randn(2, windows.num_tokens(), 24, device=device)
    expected = window_similarity(x, windows, 0.0, "triton")[0]
    for token in (0, 1 + 9, 1 + 6, 1 + 34):  # of the prefix, of window 1, of the rim at the right, of the one below
        x[1, token, 5] = value
    score, counts = window_similarity(x, windows, -math.inf, "triton")
    assert score[1, 1] == -math.inf
    assert counts.tolist() == [6, 5], "such a window reaches no threshold"
    score[1, 1] = expected[1, 1]
    assert torch.equal(score, expected)


def test_tokens_of_no_length_are_similar_to_nothing(device):
    x = torch.zeros(1, 8, 3, device=device)
    x[0, 0] = x[0, 1] = torch.tensor([2.0, 0.0, 0.0])
    x[0, 4] = 1e-20  # its squared norm is under the least that counts
    score, counts = window_similarity(x, Windows(0, 2, 4, 2, 2), 0.0, "triton")
    torch.testing.assert_close(score, torch.tensor([[1 / 6, 0.0]], device=device))
    assert counts.tolist() == [2]
    # Nor are those whose squared norm is infinite, though they are not.
    assert window_similarity(torch.full((1, 2, 3), 1e30, device=device), Windows(0, 1, 2, 1, 2), 0.0, "triton")[0] == 0


def test_reads_tokens_as_they_lie(device):
    windows = Windows(1, 3, 4, 2, 2)
    views = {
        "rows apart": torch.randn(3, 13, 2, 16, device=device)[:, :, 1],
        "channels apart": torch.randn(3, 13, 32, device=device)[:, :, ::2],
        "transposed": torch.randn(3, 16, 13, device=device).transpose(1, 2),
        "expanded": torch.randn(1, 13, 16, device=device).expand(3, 13, 16),
        "images swapped": torch.randn(13, 3, 16, device=device).transpose(0, 1),
        "not aligned": torch.randn(3, 13, 19, device=device)[:, :, 3:],
    }
    for name, x in views.items():
        same = window_similarity(x.contiguous(), windows, 0.0, "triton")
        for got, want in zip(window_similarity(x, windows, 0.0, "triton"), same, strict=True):
            assert torch.equal(got, want), name


def test_rows_further_apart_than_32_bits_count(device):
    # Only the rows themselves are ever touched, of memory that is never all there.
    apart = 2**30 + 8
    memory = torch.empty(4 * apart + 4, dtype=torch.float16, device=device)
    rows = memory.as_strided((5, 4), (apart, 1))
    rows.copy_(torch.eye(4)[[0, 0, 1, 2, 2]])
    score = window_similarity(rows[None], Windows(1, 2, 2, 1, 2), 0.0, "triton")[0]
    assert score.tolist() == [[0.0, 1.0]]
    assert window_similarity(rows[None], Windows(1, 4, 1, 2, 1), 0.0, "triton")[0].tolist() == [[0.0, 1.0]]
    images = memory.as_strided((4, 2, 4), (apart, apart, 1))  # of two rows each, the second the next one's first
    score = window_similarity(images, Windows(0, 1, 2, 1, 2), 0.0, "triton")[0]
    assert score.tolist() == [[1.0], [0.0], [0.0], [1.0]]


def test_no_images_no_windows_and_no_channels(device):
    windows = Windows(1, 2, 4, 2, 2)
    none = window_similarity(torch.randn(0, 9, 4, device=device), windows, 0.0, "triton")
    assert [tuple(part.shape) for part in none] == [(0, 2), (0,)]
    none = window_similarity(torch.randn(2, 9, 4, device=device), Windows(1, 2, 4, 3, 2), 0.0, "triton")
    assert [part.tolist() for part in none] == [[[], []], [0, 0]]
    score, counts = window_similarity(torch.randn(3, 9, 0, device=device), windows, 0.0, "triton")
    assert (score == 0).all()
    assert counts.tolist() == [2, 2, 2]


@pytest.mark.parametrize("count", ["batch", "image", 7])
def test_window_match_goes_on_where_triton_has_no_kernel(device, count):
    # The scores are Triton's; the best backend that is there makes the map of them.
    x = exact_tokens(3, 82, 16)
    got = tk.window_match(x.to(device), 0.1, count=count, num_prefix=1)
    assert_views(got)
    with tk.use_backend("reference"):
        expected = tk.window_match(x, 0.1, count=count, num_prefix=1)
    assert got.num_out == expected.num_out < (82 if got.packed is None else 3 * 82)
    assert torch.equal(got.dest.cpu(), expected.dest)
