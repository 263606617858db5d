# SPDX-License-Identifier: MIT
"""Small real pictures with a class each, as packages ship them: handwritten digits, and patches of textures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32  # pixels
TESTED = 500  # pictures held out, of each class alike
SHIFT, TURN, SCALE = 0.1, 12.0, 0.1  # of training pictures, at most: of the side, degrees, and of the size

# scikit-learn's scans are of 8 x 8 pixels, from 0 to 16; here they are enlarged.
SCANNED, BRIGHTEST = 8, 16.0

# Of scikit-image's pictures, grey. Their upper part is for training, their lower part for testing.
TEXTURES = ("brick", "grass", "gravel", "moon", "hubble_deep_field", "immunohistochemistry")
UPPER = 0.65
TRAINED = 1300  # patches


class Pictures(NamedTuple):
    """Pictures (n, 1, 32, 32), and their classes (n,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(self.train_labels.max()) + 1


def digits(seed: int) -> Pictures:
    """Scans of handwritten digits, split by the seed, of mean 0 and deviation 1."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (slow to import)
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=TESTED, stratify=labels, random_state=seed)
    train, test = (
        torch.tensor(part / BRIGHTEST, dtype=torch.float32).view(-1, 1, SCANNED, SCANNED) for part in parts[:2]
    )
    train, test = (F.interpolate(part, (SIDE, SIDE), mode="bicubic") for part in (train, test))
    mean, deviation = train.mean(), train.std()
    train, test = ((part - mean) / deviation for part in (train, test))
    own, others = (torch.tensor(part) for part in parts[2:])
    return Pictures(train, own, test, others)


def textures(seed: int) -> Pictures:
    """Patches of six textures, each of mean 0 and deviation 1: how bright one is does not tell what it is."""
    generator = np.random.default_rng(seed)
    parts: list[list[Tensor]] = [[], []]
    for name in TEXTURES:
        grey = _grey(name)
        border = round(UPPER * len(grey))
        for number, (region, wanted) in enumerate(((grey[:border], TRAINED), (grey[border:], TESTED))):
            count = math.ceil(wanted / len(TEXTURES))
            tops = generator.integers(0, region.shape[0] - SIDE + 1, count)
            lefts = generator.integers(0, region.shape[1] - SIDE + 1, count)
            patches = [region[y : y + SIDE, x : x + SIDE] for y, x in zip(tops, lefts, strict=True)]
            parts[number].append(torch.tensor(np.stack(patches), dtype=torch.float32)[:, None])
    labels = [torch.arange(len(TEXTURES)).repeat_interleave(len(own[0])) for own in parts]
    patches = [torch.cat(own) for own in parts]
    scaled = [(p - p.mean((1, 2, 3), True)) / p.std((1, 2, 3), keepdim=True).clamp(min=1e-3) for p in patches]
    return Pictures(scaled[0], labels[0], scaled[1], labels[1])


def _grey(name: str) -> np.ndarray:
    import skimage.data  # noqa: PLC0415  (slow to import)

    picture = getattr(skimage.data, name)().astype(np.float32) / 255
    return picture if picture.ndim == 2 else picture.mean(2)


SOURCES: dict[str, Callable[[int], Pictures]] = {"digits": digits, "textures": textures}


def load(name: str, seed: int, device: torch.device) -> Pictures:
    """The pictures of a source, split by the seed."""
    return Pictures(*(part.to(device) for part in SOURCES[name](seed)))


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images, each shifted, turned and scaled a little at random."""
    drawn = torch.rand(4, len(images), generator=generator).to(images.device) * 2 - 1
    shift = drawn[:2] * SHIFT * 2  # the picture reaches from -1 to 1
    angle, scale = drawn[2] * math.radians(TURN), 1 + drawn[3] * SCALE
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    turned = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], 1).view(-1, 2, 3)
    where = F.affine_grid(turned, list(images.shape), align_corners=False)
    return F.grid_sample(images, where, align_corners=False, padding_mode="border")
