# SPDX-License-Identifier: MIT
"""Data of the segmentation experiment: photographs with masks derived from them, or both from folders."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import photos
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

IGNORE = 255  # a pixel without a class, which losses and scores skip
SCALE = 4.0  # standard deviation, in pixels, of the Gaussian that averages colour and texture
TEXTURE = 2.0  # weight of texture relative to colour
SAMPLES = 2000  # pixels of each photograph for k-means
ROUNDS = 30  # iterations of k-means

# sRGB to CIE XYZ (D65, IEC 61966-2-1), and the constants of CIE Lab.
TO_XYZ = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = torch.tensor([0.9505, 1.0, 1.089]).view(3, 1, 1)
LAB_LINEAR = (6 / 29) ** 3


class Data(NamedTuple):
    """Training pictures and test crops, with values from -1 to 1.

    Attributes:
        train: pictures (3, H, W) and masks (H, W) without the part that is held out.
        images: the test crops (T, 3, S, S).
        truth: the masks of the test crops (T, S, S).
        names: the names of the test crops' pictures.
        classes: the number of classes.
    """

    train: list[tuple[Tensor, Tensor]]
    images: Tensor
    truth: Tensor
    names: list[str]
    classes: int


def load(options: argparse.Namespace, device: torch.device) -> Data:
    """Return the pictures and masks for the command line.

    Raises:
        SystemExit: a picture or mask cannot be used.
    """
    pictures = photos.load(options.images)
    if options.masks is None:
        truth, classes = derive(pictures, options.classes), options.classes
    else:
        truth, classes = read(options.masks, pictures)
    train, images, held = [], [], []
    for name, picture in pictures.items():
        raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        x = raw.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 127.5 - 1
        seen, kept = split(name, torch.cat([x, truth[name][None].float()]), options)
        train.append((seen[:3].to(device), seen[3].long().to(device)))
        images.append(kept[:3])
        held.append(kept[3].long())
    return Data(train, torch.stack(images).to(device), torch.stack(held).to(device), list(pictures), classes)


def split(name: str, picture: Tensor, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Split a picture (C, H, W) into the part for training and the test crop at its right or lower end."""
    size, crop = options.size, options.crop
    height, width = picture.shape[1:]
    if max(height, width) < size + crop or min(height, width) < max(size, crop):
        raise SystemExit(
            f"{name}: a test crop of {size} and training crops of {crop} pixels do not fit into {width} x {height}; "
            "use smaller ones (--size, --crop) or a larger picture"
        )
    if height > width:
        top, left = height - size, (width - size) // 2
        return picture[:, :top], picture[:, top:, left : left + size]
    top, left = (height - size) // 2, width - size
    return picture[:, :, :left], picture[:, top : top + size, left:]


def crops(data: Data, options: argparse.Namespace, number: int) -> tuple[Tensor, Tensor]:
    """Return a batch of random crops (B, 3, C, C), half of them mirrored, and their masks. `number` is the seed."""
    generator = torch.Generator().manual_seed(options.seed * 2**20 + number)

    def below(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    images, truth = [], []
    for _ in range(options.batch):
        picture, mask = data.train[below(len(data.train))]
        top, left = (below(length - options.crop + 1) for length in mask.shape)
        rows, columns = slice(top, top + options.crop), slice(left, left + options.crop)
        mirrored = [-1] if below(2) else []
        images.append(picture[:, rows, columns].flip(mirrored))
        truth.append(mask[rows, columns].flip(mirrored))
    return torch.stack(images), torch.stack(truth)


def derive(pictures: dict[str, Image.Image], classes: int) -> dict[str, Tensor]:
    """Return a mask (H, W) for each picture, from k-means of colour and texture over all pictures.

    The features of a pixel are the mean of CIE Lab and the deviation of the lightness in its neighbourhood. The classes
    are the clusters of these four numbers, such as "dark and smooth" or "reddish", the same in all pictures. Then each
    pixel takes the majority of its neighbourhood. Classes are not objects, so a model can learn them from the pixels
    alone. The sampled pixels depend on a fixed seed, so the masks are the same in every run.
    """
    features = {name: _features(picture) for name, picture in pictures.items()}
    generator = torch.Generator().manual_seed(0)
    samples = [
        part.flatten(1)[:, torch.randint(part[0].numel(), (SAMPLES,), generator=generator)].T
        for part in features.values()
    ]
    centers = _k_means(torch.cat(samples), classes)
    return {name: _nearest(part, centers) for name, part in features.items()}


def read(folder: Path, pictures: dict[str, Image.Image]) -> tuple[dict[str, Tensor], int]:
    """Return the mask (H, W) of each picture, from `folder`/<name>.png, and the number of classes: the largest id + 1.

    Raises:
        SystemExit: a mask is missing, unreadable, without class ids, or not of its picture's size.
    """
    if not folder.is_dir():
        raise SystemExit(f"--masks {folder}: the folder does not exist.")
    masks = {name: _read(folder / f"{name}.png", picture.size) for name, picture in pictures.items()}
    largest = max(int(mask[mask != IGNORE].max()) if (mask != IGNORE).any() else -1 for mask in masks.values())
    if largest < 1:
        raise SystemExit(f"--masks {folder}: expected at least two classes, but the largest class id is {largest}.")
    return masks, largest + 1


def _read(path: Path, size: tuple[int, int]) -> Tensor:
    try:
        with Image.open(path) as file:
            ids = np.array(file)
    except FileNotFoundError:
        raise SystemExit(f"{path}: the mask does not exist; each picture needs one with its name.") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise SystemExit(f"{path}: the mask cannot be read: {error}") from None
    if ids.ndim != 2 or ids.dtype == bool or not np.issubdtype(ids.dtype, np.integer):
        raise SystemExit(f"{path}: expected one channel of class ids, got {ids.shape} {ids.dtype}.")
    if ids.shape != size[::-1]:
        raise SystemExit(f"{path}: expected the picture's {size[0]} x {size[1]}, got {ids.shape[1]} x {ids.shape[0]}.")
    if ids.max() > IGNORE or ids.min() < 0:
        raise SystemExit(f"{path}: class ids must be 0 to {IGNORE - 1}, or {IGNORE} for no class, got {ids.max()}.")
    return torch.from_numpy(ids.astype(np.int64))


def _features(picture: Image.Image) -> Tensor:
    """Return (4, H, W): mean CIE Lab, and standard deviation of the lightness, in each pixel's neighbourhood."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    linear = torch.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,jhw->ihw", TO_XYZ, linear) / WHITE
    curved = torch.where(xyz > LAB_LINEAR, xyz.clamp(min=LAB_LINEAR) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = curved
    lab = torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])
    mean = _blur(lab, SCALE)
    variance = _blur(lab[:1] ** 2, SCALE) - mean[:1] ** 2
    return torch.cat([mean, TEXTURE * _blur(variance.clamp(min=0).sqrt(), SCALE)])


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Blur (C, H, W) with a Gaussian of `sigma` pixels; the picture is mirrored at its border."""
    reach = min(math.ceil(3 * sigma), *(length - 1 for length in x.shape[1:]))
    kernel = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    x = F.pad(x[:, None], (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


def _k_means(points: Tensor, number: int) -> Tensor:
    """Return centres (number, D) of points (n, D). Each starts at the point farthest from those before."""
    centers = points[(points - points.mean(0)).norm(dim=1).argmin()][None]
    while len(centers) < number:
        centers = torch.cat([centers, points[torch.cdist(points, centers).amin(1).argmax()][None]])
    for _ in range(ROUNDS):
        nearest = F.one_hot(torch.cdist(points, centers).argmin(1), number).float()
        size = nearest.sum(0)[:, None]
        centers = torch.where(size > 0, nearest.T @ points / size.clamp(min=1), centers)
    return centers


def _nearest(features: Tensor, centers: Tensor) -> Tensor:
    """Return the most frequent class (H, W) in each pixel's neighbourhood."""
    ids = torch.cdist(features.flatten(1).T, centers).argmin(1).view(features.shape[1:])
    return _blur(F.one_hot(ids, len(centers)).permute(2, 0, 1).float(), SCALE).argmax(0)
