# SPDX-License-Identifier: MIT
"""Pictures of token maps, pixel by pixel."""

import sys

import numpy as np
import pytest
import torch

from tokred_kernels import TokenMap
from tokred_kernels.viz import draw_tokens

PIL = pytest.importorskip("PIL.Image")


def noise(height=12, width=20):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def a_map(rows, prefix=1):
    """Slots of a grid, by rows, after `prefix` tokens that keep the first slots."""
    slots = torch.tensor(rows).flatten()
    slots = torch.where(slots < 0, slots, slots + prefix)
    return TokenMap.from_dest(torch.cat([torch.arange(prefix), slots])[None])


ROWS = [[0, 0, 1, 2, 2], [3, 0, 1, 0, 2], [3, 3, 1, 1, 1]]  # 3 x 5 patches of 4 x 4 pixels; group 0 in two parts


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_every_group_has_its_mean_colour(prefix):
    image = noise()
    picture = np.asarray(draw_tokens(image, a_map(ROWS, prefix), patch_size=4, num_prefix=prefix, outline=False))
    groups = np.kron(np.array(ROWS), np.ones((4, 4), int))
    for group in range(4):
        mean = image[groups == group].mean(0)
        assert np.abs(picture[groups == group] - mean).max() <= 0.5 + 1e-3


def test_all_kinds_of_images_give_one_picture():
    image = noise()
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    expected = draw_tokens(image, a_map(ROWS), grid=(3, 5))
    assert isinstance(expected, PIL.Image)
    assert expected.size == (20, 12)
    for other in (PIL.fromarray(image), image / 255.0, (image / 255.0).astype(np.float32), tensor, tensor / 255.0):
        assert np.abs(np.asarray(draw_tokens(other, a_map(ROWS), grid=(3, 5))).astype(int) - expected).max() <= 1
    with_gradient = (tensor / 255.0).requires_grad_()
    assert np.asarray(draw_tokens(with_gradient, a_map(ROWS), grid=(3, 5))).shape == (12, 20, 3)
    gray = PIL.fromarray(image).convert("L")
    assert draw_tokens(gray, a_map(ROWS), grid=(3, 5)).mode == "RGB"


def test_lines_are_between_groups_and_nowhere_else():
    red = (255, 0, 0)
    picture = np.asarray(draw_tokens(np.zeros((12, 20, 3)), a_map(ROWS), patch_size=4, color=red)).copy()
    line = (picture == red).all(-1)
    groups = np.kron(np.array(ROWS), np.ones((4, 4), int))
    expected = np.zeros((12, 20), bool)
    for y in range(12):
        for x in range(20):
            above = y > 0 and groups[y - 1, x] != groups[y, x]
            expected[y, x] = above or (x > 0 and groups[y, x - 1] != groups[y, x])
    assert np.array_equal(line, expected)
    one_group = draw_tokens(noise(), a_map([[0] * 5] * 3), grid=(3, 5))
    assert len(np.unique(np.asarray(one_group).reshape(-1, 3), axis=0)) == 1


@pytest.mark.parametrize("level", [0.0, 0.3, 0.8, 1.0])
def test_lines_can_be_seen_on_dark_and_light(level):
    picture = np.asarray(draw_tokens(np.full((12, 20, 3), level), a_map(ROWS), grid=(3, 5))).astype(int)
    assert np.ptp(picture[..., 0]) > 100


def test_dropped_patches():
    rows = [[0, -1], [-1, 1]]
    picture = np.asarray(draw_tokens(noise(8, 8), a_map(rows), outline=False, dropped=(1, 2, 3)))
    assert (picture[:4, 4:] == (1, 2, 3)).all()
    assert not (picture[:4, :4] == (1, 2, 3)).all(-1).any()


def test_images_of_any_size_and_of_a_batch():
    dest = torch.stack([torch.zeros(16, dtype=torch.int64), torch.arange(16)])
    token_map = TokenMap.from_dest(dest)
    image = noise(33, 50)  # 4 x 4 patches do not divide it
    first = np.asarray(draw_tokens(image, token_map, num_prefix=0, outline=False))
    second = np.asarray(draw_tokens(image, token_map, num_prefix=0, outline=False, image_index=1))
    assert first.shape == second.shape == (33, 50, 3)
    assert len(np.unique(first.reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(second.reshape(-1, 3), axis=0)) == 16


NORMALISED = np.random.default_rng(0).normal(size=(12, 20, 3))


@pytest.mark.parametrize(
    ("image", "settings", "error", "message"),
    [
        ("photo.png", {}, TypeError, r"must be a PIL image, an array .* got str"),
        (np.zeros((12, 20)), {}, ValueError, r"\(H, W, 3\), not empty, got \(12, 20\)"),
        (np.zeros((0, 20, 3)), {}, ValueError, "not empty"),
        (torch.zeros(12, 20, 3), {}, ValueError, r"must be \(3, H, W\), got \(12, 20, 3\)"),
        (torch.zeros(1, 3, 12, 20), {}, ValueError, r"must be \(3, H, W\)"),
        (np.zeros((12, 20, 3), np.int64), {}, TypeError, "uint8, or floats"),
        (NORMALISED, {}, ValueError, "before normalization"),
        (np.full((12, 20, 3), np.nan), {}, ValueError, "values from nan"),
        (noise(), {"grid": None}, ValueError, "15 patches after its prefix, which form no square"),
        (noise(), {"grid": (5, 5)}, ValueError, "makes 5 x 5 patches .* has 15"),
        (noise(), {"grid": (3, 5), "patch_size": 4}, ValueError, "not both"),
        (noise(), {"grid": 3}, TypeError, "grid must be two ints, got 3"),
        (noise(), {"grid": (3.0, 5.0)}, TypeError, "grid must be an int"),
        (noise(), {"grid": None, "patch_size": 5}, ValueError, "patch_size .* makes 2 x 4"),
        (noise(), {"grid": None, "patch_size": 0}, ValueError, "at least 1"),
        (noise(2, 4), {}, ValueError, "needs an image of as many pixels"),
        (noise(), {"num_prefix": 2}, ValueError, "but the map has 14 after its prefix"),
        (noise(), {"num_prefix": -1}, ValueError, "num_prefix must be at least 0"),
        (noise(), {"image_index": 1}, ValueError, "image_index must be under 1, got 1"),
    ],
)
def test_bad_arguments(image, settings, error, message):
    with pytest.raises(error, match=message):
        draw_tokens(image, a_map(ROWS), **{"grid": (3, 5), **settings})


def test_a_map_that_is_none():
    with pytest.raises(TypeError, match="must be a TokenMap, got Tensor"):
        draw_tokens(noise(), torch.zeros(1, 16))


def test_without_pillow_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"tokred_kernels\[viz\]"):
        draw_tokens(noise(), a_map(ROWS), grid=(3, 5))
