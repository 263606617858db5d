# SPDX-License-Identifier: MIT
import itertools
import math

import pytest
import torch
from support import (
    COSINE_BAND,
    DTYPES,
    assert_valid_windows,
    assert_views,
    dest_of,
    exact_tokens,
    golden,
    slow,
    window_members,
    window_scores,
    window_slots,
)

import tokred_kernels as tk


@pytest.mark.parametrize("name", ["algm_local_0.npz", "algm_local_1.npz"])
@pytest.mark.parametrize("given", [False, True])
def test_reproduces_the_authors_code(device, name, given):
    arrays, params = golden(name)
    x = arrays["x"].to(device)
    grid = {"grid": tuple(params["grid"])} if given else {}
    token_map = tk.window_match(x, params["threshold"], window=tuple(params["window_size"]), num_prefix=1, **grid)
    y, size = tk.merge_wavg(x, token_map)
    torch.testing.assert_close(y.cpu(), arrays["merged_wavg"])
    assert torch.equal(size.cpu(), arrays["merged_size"])


# One window and many, the whole grid, windows of a row and of a column, and every kind of rim.
CASES = [
    ((1, 2), (1, 2), 0),
    ((2, 2), (2, 2), 1),
    ((6, 6), (1, 2), 2),
    ((6, 6), (2, 1), 5),
    ((14, 14), (2, 2), 1),
    ((7, 9), (2, 2), 1),
    ((9, 10), (3, 3), 0),
    ((9, 7), (4, 2), 5),
]


def check(x, threshold, grid, window, first):
    """All ways of counting against the truth, on the backend in use."""
    x_here = x.cpu()
    windows = window_members(first, grid, window)
    scores = [window_scores(image, windows) for image in x_here]
    counts = [sum(score >= threshold for score in row) for row in scores]
    number = x.shape[1]

    def truth(image, r):
        return dest_of(window_slots(scores[image], windows, first, number, r), number)

    settings = {"grid": grid, "window": window, "num_prefix": first}
    smallest = min(counts)
    for token_map in (tk.window_match(x, threshold, **settings), tk.window_match(x, 2.0, count=smallest, **settings)):
        assert token_map.dest.tolist() == [truth(image, smallest) for image in range(len(x))]
        assert token_map.num_out == number - smallest * (len(windows[0]) - 1)
        assert_views(token_map)
    token_map = tk.window_match(x, threshold, count="image", **settings)
    assert token_map.packed.lengths == tuple(number - r * (len(windows[0]) - 1) for r in counts)
    assert_views(token_map)
    for image, r in enumerate(counts):
        assert token_map.image(image).dest.tolist() == [truth(image, r)]


@pytest.mark.parametrize("grid,window,first", CASES)
@pytest.mark.parametrize("channels", [16, *slow(1, 64)])
def test_is_what_the_definition_says(device, grid, window, first, channels):
    x = exact_tokens(3, first + math.prod(grid), channels)
    x[0, first:] = exact_tokens(1, channels, zeros=0)  # in one image every window reaches any threshold
    for dtype, threshold in zip(itertools.cycle(DTYPES), (-2.0, -0.26, 0.0, 0.01, 0.5, 1.0), strict=False):
        check(x.to(device, dtype), threshold, grid, window, first)


@pytest.mark.parametrize("grid,window,first", CASES)
@pytest.mark.parametrize("channels", [3, *slow(385)])
def test_is_right_for_any_values(device, grid, window, first, channels):
    for dtype, threshold in zip(DTYPES, (0.0, 0.1, -0.2), strict=True):
        x = torch.randn(2, first + math.prod(grid), channels).to(dtype)
        settings = {"grid": grid, "window": window, "num_prefix": first}
        scores = [window_scores(image, window_members(first, grid, window)) for image in x]
        least, most = (min(sum(s >= threshold + b for s in row) for row in scores) for b in (COSINE_BAND, -COSINE_BAND))
        token_map = tk.window_match(x.to(device), threshold, **settings)
        merged, rest = divmod(x.shape[1] - token_map.num_out, math.prod(window) - 1)
        assert rest == 0
        assert least <= merged <= most
        assert_valid_windows(token_map, x, merged, first=first, grid=grid, window=window)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_right_at_model_sizes(device, dtype):
    x = torch.randn(2, 1025, 384).to(dtype)
    token_map = tk.window_match(x.to(device), 0.0, count=100, num_prefix=1)
    assert token_map.num_out == 1025 - 300
    assert_valid_windows(token_map, x, 100, first=1, grid=(32, 32), window=(2, 2))


def test_an_image_in_a_batch_equals_the_image_alone(device):
    for tokens in (torch.randn(5, 1 + 196, 48), exact_tokens(5, 1 + 196, 16)):
        x = tokens.to(device)
        x[3] = -x[3].abs() * torch.tensor([1, -1], device=device).repeat(99)[:197, None]  # nothing to merge
        packed = tk.window_match(x, 0.01, count="image", num_prefix=1)
        smallest = tk.window_match(x, 0.01, num_prefix=1)
        assert smallest.num_out == max(packed.packed.lengths)
        given = tk.window_match(x, 0.01, count=(197 - smallest.num_out) // 3, num_prefix=1)
        assert torch.equal(given.dest, smallest.dest)
        for image in range(5):
            alone = tk.window_match(x[image : image + 1], 0.01, num_prefix=1)
            assert torch.equal(packed.image(image).dest, alone.dest)
            assert packed.packed.lengths[image] == alone.num_out


def test_nothing_to_merge_in_one_image_is_the_identity(device):
    x = torch.ones(2, 17, 4, device=device)
    x[1, 1:] *= torch.tensor([1, -1], device=device).repeat(8)[:, None]
    identity = torch.arange(17).expand(2, 17).tolist()
    assert tk.window_match(x, 0.5, num_prefix=1).dest.tolist() == identity
    assert tk.window_match(x, math.inf, num_prefix=1).dest.tolist() == identity
    packed = tk.window_match(x, 0.5, count="image", num_prefix=1)
    assert packed.packed.lengths == (5, 17)
    assert packed.image(1).dest.tolist() == identity[:1]
    assert tk.window_match(x, 0.5, count=0, num_prefix=1).dest.tolist() == identity


def test_all_tokens_identical(device):
    x = torch.full((2, 17, 64), -3.0, device=device)
    # Four windows that tie: they follow the class token by index.
    grid = [1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4, 3, 3, 4, 4]
    assert tk.window_match(x, 0.999, num_prefix=1).dest.tolist() == [[0, *grid]] * 2
    # Two of them: the other tokens by index.
    assert (
        tk.window_match(x, 0.0, count=2, num_prefix=1).dest.tolist() == [[0, 1, 1, 2, 2, 1, 1, 2, 2, *range(3, 11)]] * 2
    )
    assert tk.window_match(x * 0, 0.1, num_prefix=1).num_out == 17, "zero tokens are similar to nothing"
    assert tk.window_match(x * 0, 0.0, num_prefix=1).dest.tolist() == [[0, *grid]] * 2


def test_a_count_that_is_too_large_merges_all_windows(device):
    x = torch.randn(2, 1 + 5 * 7, 4, device=device)
    token_map = tk.window_match(x, 0.0, grid=(5, 7), count=1000, num_prefix=1)
    assert token_map.num_out == 36 - 3 * 6
    assert torch.equal(token_map.dest, tk.window_match(x, -2.0, grid=(5, 7), num_prefix=1).dest)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_windows_that_are_not_finite_never_merge(device, value):
    x = torch.ones(1, 16, 4, device=device)
    x[0, 5, 2] = value
    for threshold in (0.5, -2.0, -math.inf):
        token_map = tk.window_match(x, threshold, num_prefix=0)
        assert token_map.num_out == 7
        assert token_map.count[0, token_map.dest[0, 5]] == 1


def test_empty_batch_and_no_channels(device):
    for count, slots in (("batch", 17), ("image", 0), (2, 11)):
        token_map = tk.window_match(torch.randn(0, 17, 4, device=device), 0.5, count=count, num_prefix=1)
        assert token_map.dest.shape == (0, 17)
        assert token_map.num_out == slots
    assert tk.window_match(torch.randn(1, 17, 0, device=device), 0.5, num_prefix=1).num_out == 17


def test_leaves_no_gradient_and_reads_strided_tokens(device):
    x = torch.randn(2, 17, 8, device=device, requires_grad=True)
    for count in ("batch", "image", 1):
        token_map = tk.window_match(x, 0.0, count=count, num_prefix=1)
        assert not token_map.dest.requires_grad
        y = tk.merge(x, token_map)
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
        transposed = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(tk.window_match(transposed, 0.0, count=count, num_prefix=1).dest, token_map.dest)


def test_a_grid_that_the_window_does_not_divide_keeps_its_rim(device):
    x = torch.ones(1, 15, 4, device=device)
    token_map = tk.window_match(x, 0.5, grid=(3, 5), num_prefix=0)
    assert token_map.dest.tolist() == [[0, 0, 1, 1, 2, 0, 0, 1, 1, 3, 4, 5, 6, 7, 8]]
    divided = tk.window_match(x, 0.5, grid=(3, 5), window=(3, 5), num_prefix=0, uneven="refuse")
    assert divided.num_out == 1


def test_uneven_grids_can_raise():
    refuse = {"grid": (3, 5), "num_prefix": 0, "uneven": "refuse"}
    with pytest.raises(ValueError, match=r"window must divide the grid \(3, 5\), got \(2, 2\)"):
        tk.window_match(torch.ones(1, 15, 4), 0.5, **refuse)
    with pytest.raises(ValueError, match=r"window must divide the grid \(3, 5\), got \(3, 2\)"):
        tk.window_match(torch.ones(1, 15, 4), 0.5, window=(3, 2), **refuse)
    with pytest.raises(ValueError, match=r"window must divide the grid \(3, 5\), got \(2, 5\)"):
        tk.window_match(torch.ones(1, 15, 4), 0.5, window=(2, 5), **refuse)


def test_a_backend_that_cannot_run_the_call_raises():
    with tk.use_backend("cuda"), pytest.raises(RuntimeError, match=r'"cuda" was requested .*can: reference, cpu'):
        tk.window_match(torch.randn(1, 17, 4), 0.5, num_prefix=1)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda x: tk.window_match(x, math.nan, num_prefix=1), ValueError, "threshold must be a number, got NaN"),
        (
            lambda x: tk.window_match(x, "0.5", num_prefix=1),
            TypeError,
            r"threshold must be a number, got str \('0.5'\)",
        ),
        (lambda x: tk.window_match(x, True, num_prefix=1), TypeError, r"threshold must be a number, got bool \(True\)"),
        (lambda x: tk.window_match(x, None, num_prefix=1), TypeError, "threshold must be a number, got NoneType"),
        (lambda x: tk.window_match(x[0], 0.5, num_prefix=1), ValueError, r"x must be \(B, N, C\), got shape \(17, 4\)"),
        (lambda x: tk.window_match(x.long(), 0.5, num_prefix=1), TypeError, "x must be float32.*int64"),
        (lambda x: tk.window_match([1.0], 0.5, num_prefix=1), TypeError, "x must be a torch.Tensor, got list"),
        (
            lambda x: tk.window_match(x, 0.5, grid=(4, 5), num_prefix=1),
            ValueError,
            r"N - num_prefix = 17 - 1.*\(4, 5\).*holds 20",
        ),
        (lambda x: tk.window_match(x, 0.5, num_prefix=2), ValueError, "grid must be given if.* 17 - 2 is not a sq"),
        (lambda x: tk.window_match(x, 0.5, num_prefix=17), ValueError, "grid must be given if .* 17 - 17 is not"),
        (lambda x: tk.window_match(x, 0.5, num_prefix=18), ValueError, "grid must be given if .* 17 - 18 is not"),
        (lambda x: tk.window_match(x, 0.5, num_prefix=-1), ValueError, "num_prefix must be at least 0, got -1"),
        (lambda x: tk.window_match(x, 0.5, num_prefix=1.0), TypeError, "num_prefix must be an int, got float"),
        (
            lambda x: tk.window_match(x, 0.5, grid=16, num_prefix=1),
            TypeError,
            r"grid must be a pair \(height, width\), got 16",
        ),
        (
            lambda x: tk.window_match(x, 0.5, grid=(4.0, 4), num_prefix=1),
            TypeError,
            "grid height must be an int, got float",
        ),
        (
            lambda x: tk.window_match(x, 0.5, grid=(16, 0), num_prefix=1),
            ValueError,
            "grid width must be at least 1, got 0",
        ),
        (
            lambda x: tk.window_match(x, 0.5, window=(5, 1), num_prefix=1),
            ValueError,
            r"window must fit.*grid \(4, 4\), got \(5, 1\)",
        ),
        (
            lambda x: tk.window_match(x, 0.5, window=(1, 5), num_prefix=1),
            ValueError,
            r"window must fit.*grid \(4, 4\), got \(1, 5\)",
        ),
        (
            lambda x: tk.window_match(x, 0.5, window=(1, 1), num_prefix=1),
            ValueError,
            r"at least 2 tokens, got \(1, 1\)",
        ),
        (lambda x: tk.window_match(x, 0.5, window=(2, 2, 2), num_prefix=1), TypeError, "window must be a pair"),
        (
            lambda x: tk.window_match(x, 0.5, window=(0, 2), num_prefix=1),
            ValueError,
            "window height must be at least 1, got 0",
        ),
        (
            lambda x: tk.window_match(x, 0.5, uneven="pad", num_prefix=1),
            ValueError,
            "uneven must be one of keep, refuse, got 'pad'",
        ),
        (
            lambda x: tk.window_match(x, 0.5, count="all", num_prefix=1),
            ValueError,
            'count must be "batch", "image" or an int, got \'al',
        ),
        (lambda x: tk.window_match(x, 0.5, count=-1, num_prefix=1), ValueError, "count must be at least 0, got -1"),
        (lambda x: tk.window_match(x, 0.5, count=1.0, num_prefix=1), TypeError, "count must be an int, got float"),
        (lambda x: tk.window_match(x, 0.5, count=None, num_prefix=1), TypeError, "count must be an int, got NoneType"),
        (
            lambda x: tk.window_match(x, 0.5, count="image", group=1, num_prefix=1),
            ValueError,
            'group must be None unless count="batc',
        ),
        (
            lambda x: tk.window_match(x, 0.5, count=3, group=1, num_prefix=1),
            ValueError,
            "group must be None unless .*got count=3",
        ),
        (
            lambda x: tk.window_match(x[:1, :1].expand(2**17, 2**14, 4), 0.5, num_prefix=1),
            ValueError,
            "at most 2147479552 tokens",
        ),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=rf"^tokred_kernels\.window_match: .*{words}"):
        call(torch.randn(2, 17, 4))
