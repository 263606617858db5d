# SPDX-License-Identifier: MIT
"""Scans of handwritten digits, as scikit-learn ships them: 1797 pictures of 8 x 8 pixels, here enlarged to 32 x 32."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SCANNED, SIDE = 8, 32  # pixels a side
CLASSES = 10
BRIGHTEST = 16.0
TESTED = 500  # pictures held out, of each class alike
SHIFT, TURN, SCALE = 0.1, 12.0, 0.1  # of training pictures, at most: of the side, degrees, and of the size


class Digits(NamedTuple):
    """Pictures (n, 1, 32, 32) of mean 0 and deviation 1, and their classes (n,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load(seed: int, device: torch.device) -> Digits:
    """The pictures, split by the seed."""
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
    return Digits(*(part.to(device) for part in (train, own, test, others)))


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images, each shifted, turned and scaled a little at random."""
    drawn = torch.rand(4, len(images), generator=generator).to(images.device) * 2 - 1
    shift = drawn[:2] * SHIFT * 2  # the picture reaches from -1 to 1
    angle, scale = drawn[2] * math.radians(TURN), 1 + drawn[3] * SCALE
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    turned = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], 1).view(-1, 2, 3)
    where = F.affine_grid(turned, list(images.shape), align_corners=False)
    return F.grid_sample(images, where, align_corners=False, padding_mode="border")
