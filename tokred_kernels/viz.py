# SPDX-License-Identifier: MIT
"""Draw the groups of a token map on an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokred_kernels.checks import check_count, check_flag, shown
from tokred_kernels.token_map import TokenMap

if TYPE_CHECKING:
    from PIL.Image import Image

WHITE = (255, 255, 255)
BLACK = (0, 0, 0)
LUMA = np.array([0.299, 0.587, 0.114])  # brightness of red, green and blue (ITU-R BT.601)
LIGHT = 140  # of 255: on brighter groups, a dark line is clearer
OUTLINE = 0.65  # share of black or white in the color of a line


def draw_tokens(
    image: Any,
    token_map: TokenMap,
    *,
    patch_size: int | tuple[int, int] | None = None,
    grid: tuple[int, int] | None = None,
    num_prefix: int = 1,
    image_index: int = 0,
    outline: bool = True,
    color: tuple[int, int, int] | None = None,
    dropped: tuple[int, int, int] = BLACK,
) -> Image:
    """Draw every group of patches in its mean color with an outline, as in the ToMe paper (figure 4).

    Args:
        image: the model's input before normalization: a PIL image, an array (H, W, 3) or a tensor (3, H, W), as uint8
            or floats in [0, 1].
        token_map: the map of `num_prefix` tokens and the patches of the grid in row order, such as `model.token_map`.
        patch_size: (height, width) of a patch in pixels, or one number for both; determines the grid.
        grid: (rows, columns) of patches. The image size need not be a multiple of it. Without `patch_size` and `grid`,
            the grid is square if possible, else an error.
        num_prefix: how many leading tokens of the map are not patches.
        image_index: the image's index in the batch of the map.
        outline: draw a line between groups. If a group is not connected, each part has an outline.
        color: (red, green, blue) of the line; default a lighter shade on dark groups, and a darker one on light groups.
        dropped: the color of patches whose token was dropped.

    Returns:
        A PIL image of the size of `image`.

    Raises:
        TypeError, ValueError: a wrong argument, or a grid that does not match the map.
        ImportError: Pillow is not installed.
    """
    pixels = _pixels(image)
    if not isinstance(token_map, TokenMap):
        raise TypeError(f"tokred_kernels.viz: token_map must be a TokenMap, got {type(token_map).__name__}")
    num_prefix = check_count("viz.draw_tokens", "num_prefix", num_prefix)
    image_index = check_count("viz.draw_tokens", "image_index", image_index)
    check_flag("viz.draw_tokens", "outline", outline)
    _check_color("dropped", dropped)
    if color is not None:
        _check_color("color", color)
    if image_index >= token_map.batch:
        raise ValueError(f"tokred_kernels.viz: image_index must be under {token_map.batch}, got {image_index}")
    token_map = token_map.image(image_index)
    patches = token_map.num_tokens - num_prefix
    down, across = _grid(pixels.shape[:2], patches, patch_size, grid)
    slot = token_map.dest[0, num_prefix:].cpu().numpy().reshape(down, across)

    # Nearest patch of each pixel, so that any image size works with any grid.
    height, width = pixels.shape[:2]
    row, column = np.arange(height) * down // height, np.arange(width) * across // width
    group = slot[row[:, None], column[None, :]] + 1  # 0: dropped
    colors = _mean_colors(pixels, group, token_map.num_out + 1)
    colors[0] = dropped
    picture = colors[group]
    if outline:
        thickness = max(1, round(min(height / down, width / across) / 16))
        edge = _edges(group, thickness)
        picture[edge] = _contrast(picture[edge]) if color is None else color
    return _pillow().fromarray(picture.round().clip(0, 255).astype(np.uint8))


def _check_color(name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise TypeError(
            f"tokred_kernels.viz.draw_tokens: {name} must be three ints (red, green, blue), got {shown(value)}"
        )
    for part in value:
        check_count("viz.draw_tokens", name, part, most=255)


def _pillow() -> Any:
    try:
        from PIL import Image  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise ImportError('tokred_kernels.viz needs Pillow: pip install "tokred_kernels[viz]"') from error
    return Image


def _pixels(image: Any) -> np.ndarray:
    """Return the image as (H, W, 3) float32 in [0, 255]."""
    if isinstance(image, Tensor):
        if image.layout is not torch.strided or image.is_nested or image.is_meta:
            raise TypeError("tokred_kernels.viz: image must be a dense tensor with values")
        if image.dim() != 3 or image.shape[0] != 3:
            raise ValueError(f"tokred_kernels.viz: an image tensor must be (3, H, W), got {tuple(image.shape)}")
        image = image.detach().cpu().permute(1, 2, 0)
        image = (image.float() if image.is_floating_point() else image).numpy(force=True)
    elif not isinstance(image, np.ndarray):
        if not isinstance(image, _pillow().Image):
            raise TypeError(
                "tokred_kernels.viz: image must be a PIL image, an array (H, W, 3) or a tensor (3, H, W), "
                f"got {type(image).__name__}"
            )
        image = np.asarray(image.convert("RGB"))
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"tokred_kernels.viz: an image array must be (H, W, 3), not empty, got {image.shape}")
    if image.dtype == np.uint8:
        return image.astype(np.float32)
    if not np.issubdtype(image.dtype, np.floating):
        raise TypeError(f"tokred_kernels.viz: an image must be uint8, or floats in [0, 1], got {image.dtype}")
    # Interpolation can exceed the range slightly; a normalized image exceeds it a lot.
    low, high = float(image.min()), float(image.max())
    if not (low >= -0.1 and high <= 1.1):
        raise ValueError(
            f"tokred_kernels.viz: an image of floats must be in [0, 1], got values from {low:.3g} to {high:.3g}; "
            "give the image before normalization"
        )
    return image.astype(np.float32).clip(0, 1) * 255


def _grid(
    size: tuple[int, ...], patches: int, patch_size: int | tuple[int, int] | None, grid: tuple[int, int] | None
) -> tuple[int, int]:
    height, width = size
    if patch_size is not None and grid is not None:
        raise ValueError("tokred_kernels.viz: give patch_size or grid, not both")
    if grid is None and patch_size is None:
        side = round(max(patches, 0) ** 0.5)
        if side * side != patches or patches == 0:
            raise ValueError(
                f"tokred_kernels.viz: the map has {patches} patches after its prefix, which form no square; "
                "give grid=(down, across) or patch_size, and check num_prefix"
            )
        return side, side
    given = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size if grid is None else grid
    name = "patch_size" if grid is None else "grid"
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"tokred_kernels.viz: {name} must be two ints, got {shown(given)}")
    for value in given:
        check_count("viz.draw_tokens", name, value, least=1)
    down, across = (height // given[0], width // given[1]) if grid is None else given
    if down * across != patches:
        raise ValueError(
            f"tokred_kernels.viz: {name} {tuple(given)} makes {down} x {across} patches of the {height} x {width} "
            f"image, but the map has {patches} after its prefix; check num_prefix too"
        )
    if down > height or across > width:
        raise ValueError(
            f"tokred_kernels.viz: a grid of {down} x {across} needs an image of as many pixels, got {size}"
        )
    return down, across


def _mean_colors(pixels: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """Return the mean color of each group, (groups, 3)."""
    index = group.ravel()
    count = np.bincount(index, minlength=groups)
    sums = [np.bincount(index, weights=pixels[..., channel].ravel(), minlength=groups) for channel in range(3)]
    return np.stack(sums, 1) / np.maximum(count, 1)[:, None]


def _edges(group: np.ndarray, thickness: int) -> np.ndarray:
    """Return the pixels within `thickness` of another group above or to the left, (H, W) bool."""
    edge = np.zeros(group.shape, bool)
    for step in range(1, thickness + 1):
        edge[step:] |= group[step:] != group[:-step]
        edge[:, step:] |= group[:, step:] != group[:, :-step]
    return edge


def _contrast(colors: np.ndarray) -> np.ndarray:
    """Return the same hues (n, 3), much lighter for dark colors and much darker for light ones."""
    light = colors @ LUMA > LIGHT
    return (1 - OUTLINE) * colors + OUTLINE * np.where(light[:, None], BLACK, WHITE)
