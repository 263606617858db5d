# SPDX-License-Identifier: MIT
"""The CUDA kernels of window_similarity and window_map, run on the host, against the reference backend."""

import pytest
import torch
from emulated import DTYPES, SMALL_SHARED, flat, floats, poisoned, starts, whole_numbers

from tokred_kernels.backends.reference import window_map
from tokred_kernels.backends.reference.window_similarity import mean_cosine
from tokred_kernels.windows import Windows

# Grids with and without a rim at the right and the bottom; windows of 2, 3, 4 and more tokens, up to all of the grid.
SHAPES = {
    "2x2": Windows(1, 4, 6, 2, 2),
    "2x2 with a rim": Windows(0, 7, 5, 2, 2),
    "3x3": Windows(5, 7, 9, 3, 3),
    "1x2": Windows(2, 3, 5, 1, 2),
    "4x1": Windows(1, 9, 3, 4, 1),
    "1x3": Windows(0, 2, 7, 1, 3),
    "2x3": Windows(1, 4, 4, 2, 3),
    "all": Windows(1, 12, 11, 12, 11),
    "single": Windows(0, 2, 1, 2, 1),
}
shapes = pytest.mark.parametrize("windows", SHAPES.values(), ids=SHAPES)


def emulated_similarity(emulator, x, windows, threshold=0.5, **options):
    """The scores, with their counts checked."""
    images, _, channels = x.shape
    score = torch.full((images * windows.number(),), torch.nan)
    (counts,) = poisoned(images)
    integers = (x.stride(0), x.stride(1), images, channels, DTYPES[x.dtype], *windows)
    buffers = [flat(x), torch.tensor([threshold], dtype=torch.float32), score, counts]
    emulator.call("window_similarity", integers, buffers, **options)
    score = score.view(images, windows.number())
    assert counts.tolist() == (score >= threshold).sum(1).tolist()
    return score


def alike(windows, images, channels, dtype=torch.float32):
    """Tokens that share a direction more or less, so that cosines of all kinds come."""
    base = torch.randn(images, 1, channels)
    noise = torch.randn(images, windows.num_tokens(), channels)
    return (base + torch.rand(images, windows.num_tokens(), 1) * 3 * noise).to(dtype)


def check_similarity(emulator, x, windows, **options):
    exact = mean_cosine(x, windows, torch.float64).float()
    score = emulated_similarity(emulator, x, windows, float(exact.median()), **options)
    assert torch.equal(score == -torch.inf, exact == -torch.inf)
    finite = exact > -torch.inf
    # A few roundings of unit vectors, and where sums of n^2 cosines are differences, of n^2 such terms.
    torch.testing.assert_close(score[finite], exact[finite], rtol=0, atol=4e-6)


# An element, less than a load of 16 bytes, one, some over; a sector for each lane, and several.
@floats
@pytest.mark.parametrize("channels", [1, 3, 8, 33, 64, 200])
@shapes
def test_window_similarity(emulator, windows, channels, dtype):
    check_similarity(emulator, alike(windows, 2, channels, dtype), windows, reverse=channels % 2 == 1)


@pytest.mark.parametrize("name", ["2x2", "3x3", "all"])
# Sectors for all lanes; and more units than a block has threads.
@pytest.mark.parametrize(
    ("channels", "dtype"), [(768, torch.bfloat16), (600, torch.float32), (1537, torch.float16)], ids=str
)
def test_window_similarity_of_many_channels(emulator, name, channels, dtype):
    check_similarity(emulator, alike(SHAPES[name], 1, channels, dtype), SHAPES[name])


@pytest.mark.parametrize("name", ["2x2", "3x3"])
def test_window_similarity_of_more_windows_than_a_block_has(emulator, name):
    height, width = SHAPES[name][3:]
    for channels in (2, 64):
        windows = Windows(1, 20 * height, 15 * width, height, width)
        check_similarity(emulator, alike(windows, 2, channels), windows)


@floats
@pytest.mark.parametrize("name", ["2x2", "1x2", "3x3"])
@pytest.mark.parametrize(
    ("channels", "padding", "offset"), [(40, 8, 0), (40, 3, 0), (40, 0, 4), (40, 5, 8), (37, 3, 0)]
)
def test_scores_do_not_depend_on_strides_and_alignment(emulator, name, dtype, channels, padding, offset):
    windows = SHAPES[name]
    x = alike(windows, 2, channels, dtype)
    padded = torch.randn(2, windows.num_tokens() + 1, channels + padding).to(dtype)
    strided = padded[:, 1:, :channels]
    strided.copy_(x)
    expected = emulated_similarity(emulator, x, windows)
    assert torch.equal(emulated_similarity(emulator, strided, windows, offset=offset), expected)
    for image in range(2):
        assert torch.equal(emulated_similarity(emulator, x[image : image + 1], windows), expected[image : image + 1])


@floats
@shapes
def test_zero_tokens_are_similar_to_nothing(emulator, windows, dtype):
    x = torch.zeros(2, windows.num_tokens(), 24, dtype=dtype)
    assert emulated_similarity(emulator, x, windows).tolist() == [[0.0] * windows.number()] * 2
    x[:, ::2] = 1
    check_similarity(emulator, x, windows)


@floats
@shapes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_windows_with_a_token_that_is_no_number_never_merge(emulator, windows, dtype, value):
    x = alike(windows, 2, 40, dtype)
    x[0, windows.first, 39] = value  # in the first window, beside a zero token
    x[0, windows.first + (1 if windows.width > 1 else windows.grid_width)] = 0
    x[1, : windows.first] = value  # in no window
    check_similarity(emulator, x, windows)
    score = emulated_similarity(emulator, x, windows)
    assert score[0, 0] == -torch.inf and (score[0, 1:] > -torch.inf).all() and (score[1] > -torch.inf).all()


@pytest.mark.parametrize("name", ["2x2", "3x3"])
def test_tokens_whose_norms_overflow_count_as_zero(emulator, name):
    windows = SHAPES[name]
    x = alike(windows, 1, 40)
    x[0, windows.first : windows.first + 2] *= 1e25
    score = emulated_similarity(emulator, x, windows)
    x[0, windows.first : windows.first + 2] = 0
    torch.testing.assert_close(score, emulated_similarity(emulator, x, windows), rtol=0, atol=1e-6)


@shapes
def test_equal_tokens_have_similarity_one_in_every_window(emulator, windows):
    x = torch.randn(1, 1, 50).expand(2, windows.num_tokens(), 50).contiguous()
    score = emulated_similarity(emulator, x, windows, threshold=-1.0)
    torch.testing.assert_close(score, torch.ones_like(score), rtol=0, atol=1e-6)
    assert (score == score[0, 0]).all()


def test_window_similarity_without_channels_or_images(emulator):
    windows = SHAPES["2x2"]
    for name in ("2x2", "3x3"):
        x = torch.zeros(2, SHAPES[name].num_tokens(), 0)
        assert (emulated_similarity(emulator, x, SHAPES[name], 0.0) == 0).all()
    assert emulated_similarity(emulator, torch.zeros(0, windows.num_tokens(), 8), windows).shape == (
        0,
        windows.number(),
    )


def test_window_similarity_refuses_float64(emulator):
    windows = SHAPES["2x2"]
    with pytest.raises(RuntimeError, match="window_similarity: float64 is not supported on CUDA"):
        emulated_similarity(emulator, torch.zeros(1, windows.num_tokens(), 8, dtype=torch.float64), windows)


def check_map(emulator, score, windows, r, counts=None, **options):
    images, tokens, gone = score.shape[0], windows.num_tokens(), windows.size() - 1
    starts_out, num_out, slots = None, 0, images * (tokens - r * gone)
    if counts is not None:
        starts_out = starts((tokens - counts * gone).tolist())
        slots = num_out = int(starts_out[-1])
    outputs = poisoned(images * tokens, images * tokens, slots, slots)
    buffers = [score.flatten(), counts, starts_out, *outputs]
    emulator.call("window_map", (images, r, *windows), buffers, **options)
    expected = window_map.window_map(score, windows, r, counts, starts_out, num_out)
    for name, ours, theirs in zip(("dest", "members", "begin", "count"), outputs, expected, strict=True):
        assert ours.tolist() == theirs.flatten().tolist(), name


# The order of the windows in shared memory, and, where that is too small, among the members.
def limits(windows):
    return {"shared": SMALL_SHARED, "global": 8 * windows.number() + 255}


@pytest.mark.parametrize("memory", ["shared", "global"])
@shapes
def test_window_map(emulator, windows, memory):
    limit = limits(windows)[memory]
    for images in (1, 3):
        score = whole_numbers(images, windows.number())  # ties
        score[0, ::3] = -torch.inf
        for r in sorted({0, 1, windows.number() // 2, windows.number()}):
            check_map(emulator, score, windows, r, shared_limit=limit, reverse=r == 1)


@pytest.mark.parametrize("memory", ["shared", "global"])
@shapes
def test_packed_window_map(emulator, windows, memory):
    score = torch.randn(4, windows.number())
    most = windows.number()
    for counts in ((0, 0, 0, 0), (most, 0, most // 2, 1), (most, most, most, most)):
        given = torch.tensor(counts, dtype=torch.int32)
        check_map(emulator, score, windows, 0, given, shared_limit=limits(windows)[memory])


# Numbers of windows around a power of two, around the block's threads and far above; a grid without rim or prefix.
@pytest.mark.parametrize("memory", ["shared", "global"])
@pytest.mark.parametrize(
    "windows",
    [Windows(0, 1, n, 1, 2) for n in (3, 6, 14, 16, 18, 62, 66)] + [Windows(1, 65, 66, 2, 2), Windows(0, 90, 92, 2, 1)],
    ids=str,
)
def test_window_map_orders_any_number_of_windows(emulator, windows, memory):
    score = whole_numbers(2, windows.number(), high=windows.number() // 2)
    for r in (windows.number() // 3, windows.number()):
        check_map(emulator, score, windows, r, shared_limit=limits(windows)[memory])


def test_window_map_without_images(emulator):
    check_map(emulator, torch.zeros(0, 6), SHAPES["2x2"], 2)


@pytest.mark.parametrize(
    ("channels", "size", "alignment", "expected"),
    [
        (768, 2, 0, (96, 16, 16, 4, 1)),
        (1024, 2, 0, (128, 16, 16, 4, 1)),
        (2048, 2, 0, (256, 32, 8, 7, 1)),
        (192, 2, 0, (24, 4, 64, 1, 1)),
        (64, 2, 0, (8, 4, 64, 1, 1)),
        (64, 2, 8, (8, 4, 64, 1, 0)),
        (33, 4, 0, (9, 4, 64, 1, 0)),
        (1, 2, 0, (1, 1, 256, 1, 0)),
        (0, 4, 0, (0, 1, 256, 1, 1)),
    ],
)
def test_windows_are_shared_out_to_lanes(emulator, channels, size, alignment, expected):
    assert emulator.call("window_config", (0, 14, 14, 2, 2, channels, size, alignment)) == expected
