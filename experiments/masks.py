# SPDX-License-Identifier: MIT
"""What the segmentation example learns: photographs, and masks derived from them, or both from folders."""

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

IGNORE = 255  # a pixel of no class: in no loss and in no figure
SCALE = 4.0  # pixels over which colour and texture are averaged (standard deviation of a Gaussian)
TEXTURE = 2.0  # what a unit of texture weighs against a unit of colour
SAMPLES = 2000  # pixels of each photograph that the classes are found from
ROUNDS = 30  # of k-means

# sRGB to CIE XYZ under D65, each row over the white point (IEC 61966-2-1), and on to CIE Lab.
TO_XYZ = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = torch.tensor([0.9505, 1.0, 1.089]).view(3, 1, 1)
LAB_LINEAR = (6 / 29) ** 3


class Data(NamedTuple):
    """What is learnt and what is tested, pictures as numbers from -1 to 1.

    Attributes:
        train: pictures (3, H, W) and their masks (H, W), the end that is held out cut off.
        images: (T, 3, S, S), the test crops.
        truth: (T, S, S), their masks.
        names: of the test crops' pictures.
        classes: how many there are.
    """

    train: list[tuple[Tensor, Tensor]]
    images: Tensor
    truth: Tensor
    names: list[str]
    classes: int


def load(options: argparse.Namespace, device: torch.device) -> Data:
    """The pictures and masks that the command line asks for.

    Raises:
        SystemExit: one cannot be used, with a line that says why.
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
    """Of a picture (C, H, W) what is trained on, and the test crop: the middle of its right or of its lower end."""
    size, crop = options.size, options.crop
    height, width = picture.shape[1:]
    if max(height, width) < size + crop or min(height, width) < max(size, crop):
        raise SystemExit(
            f"{name}: a test crop of {size} pixels beside training crops of {crop} do not fit into {width} x {height}; "
            "take smaller ones (--size, --crop) or a larger picture"
        )
    if height > width:
        top, left = height - size, (width - size) // 2
        return picture[:, :top], picture[:, top:, left : left + size]
    top, left = (height - size) // 2, width - size
    return picture[:, :, :left], picture[:, top : top + size, left:]


def crops(data: Data, options: argparse.Namespace, number: int) -> tuple[Tensor, Tensor]:
    """The batch of that number of random crops, half of them mirrored: (B, 3, C, C) and (B, C, C)."""
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
    """A mask (H, W) for each picture: k-means of colour and texture, over all of them together.

    Of each pixel, CIE Lab averaged over its neighbourhood, and how much the lightness varies there; the classes are the
    k-means clusters of these four numbers, so that "dark and smooth", "reddish" or "textured" is one class in all
    pictures. At last every pixel takes what most of its neighbours are. No class is an object: what a mask says can be
    seen from the pixels around, and nothing else is needed to learn it. Nothing is random but the pixels looked at,
    and those are drawn from a fixed seed.
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
    """The mask (H, W) of each picture, `folder`/<its name>.png, and the number of classes: the largest id + 1.

    Raises:
        SystemExit: a mask is missing, cannot be read, has no class ids or another size than its picture.
    """
    if not folder.is_dir():
        raise SystemExit(f"--masks {folder}: there is no such folder.")
    masks = {name: _read(folder / f"{name}.png", picture.size) for name, picture in pictures.items()}
    largest = max(int(mask[mask != IGNORE].max()) if (mask != IGNORE).any() else -1 for mask in masks.values())
    if largest < 1:
        raise SystemExit(f"--masks {folder}: there must be two classes or more, the largest class id is {largest}.")
    return masks, largest + 1


def _read(path: Path, size: tuple[int, int]) -> Tensor:
    try:
        with Image.open(path) as file:
            ids = np.array(file)
    except FileNotFoundError:
        raise SystemExit(f"{path}: there is no such mask; each picture needs one of its name.") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise SystemExit(f"{path}: this mask cannot be read: {error}") from None
    if ids.ndim != 2 or ids.dtype == bool or not np.issubdtype(ids.dtype, np.integer):
        raise SystemExit(f"{path}: a mask must have one channel of class ids, not {ids.shape} {ids.dtype}.")
    if ids.shape != size[::-1]:
        raise SystemExit(f"{path}: this mask is {ids.shape[1]} x {ids.shape[0]}, its picture {size[0]} x {size[1]}.")
    if ids.max() > IGNORE or ids.min() < 0:
        raise SystemExit(f"{path}: class ids must be 0 to {IGNORE - 1}, or {IGNORE} for no class, not {ids.max()}.")
    return torch.from_numpy(ids.astype(np.int64))


def _features(picture: Image.Image) -> Tensor:
    """(4, H, W): CIE Lab and the standard deviation of lightness, of each pixel's neighbourhood."""
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
    """(C, H, W) under a Gaussian of `sigma` pixels; what is beyond the rim is mirrored."""
    reach = min(math.ceil(3 * sigma), *(length - 1 for length in x.shape[1:]))
    kernel = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    x = F.pad(x[:, None], (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


def _k_means(points: Tensor, number: int) -> Tensor:
    """(number, D) centres of points (n, D), which start far apart: each at the point farthest from those before."""
    centers = points[(points - points.mean(0)).norm(dim=1).argmin()][None]
    while len(centers) < number:
        centers = torch.cat([centers, points[torch.cdist(points, centers).amin(1).argmax()][None]])
    for _ in range(ROUNDS):
        nearest = F.one_hot(torch.cdist(points, centers).argmin(1), number).float()
        size = nearest.sum(0)[:, None]
        centers = torch.where(size > 0, nearest.T @ points / size.clamp(min=1), centers)
    return centers


def _nearest(features: Tensor, centers: Tensor) -> Tensor:
    """(H, W): the class that most pixels around each have."""
    ids = torch.cdist(features.flatten(1).T, centers).argmin(1).view(features.shape[1:])
    return _blur(F.one_hot(ids, len(centers)).permute(2, 0, 1).float(), SCALE).argmax(0)
