# SPDX-License-Identifier: MIT
"""Small data sets that Python packages contain: handwritten digits, patches of textures, and faces."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32  # pixels
SHIFT, TURN, SCALE = 0.1, 12.0, 0.1  # largest augmentation: share of the side, degrees, share of the size

# scikit-learn's scans have 8 x 8 pixels with values from 0 to 16.
SCANNED, BRIGHTEST = 8, 16.0
SCANS_TESTED = 500  # held out, with the same share of each class

# Patches of scikit-image's pictures, in grey. A picture is cut into blocks; some blocks, spread over the picture, are
# held out for testing. One half of a picture would be a different task: the moon's edge looks unlike its plains.
TEXTURES = ("brick", "grass", "gravel", "moon", "hubble_deep_field", "immunohistochemistry")
BLOCK = 64  # pixels
HELD_OUT = 0.3  # share of the blocks
FLAT = 0.005  # a patch with a smaller standard deviation, such as sky, has no texture
PATCHES_TRAINED, PATCHES_TESTED = 2600, 1200

# scikit-image's 200 patches of Labeled Faces in the Wild, with 25 x 25 pixels; the first half are faces. There are few
# patches, so they are tested by cross-validation: FOLDS consecutive seeds test each patch once.
FACES = 100
FOLDS = 5


class Pictures(NamedTuple):
    """Pictures (n, 1, 32, 32) and their classes (n,)."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """The number of classes."""
        return int(self.train_labels.max()) + 1


def digits(seed: int) -> Pictures:
    """Return scans of handwritten digits, split by the seed, with mean 0 and standard deviation 1."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  (slow to import)
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=SCANS_TESTED, stratify=labels, random_state=seed)
    train, test = (
        torch.tensor(part / BRIGHTEST, dtype=torch.float32).view(-1, 1, SCANNED, SCANNED) for part in parts[:2]
    )
    train, test = (F.interpolate(part, (SIDE, SIDE), mode="bicubic") for part in (train, test))
    mean, deviation = train.mean(), train.std()
    train, test = ((part - mean) / deviation for part in (train, test))
    own, others = (torch.tensor(part) for part in parts[2:])
    return Pictures(train, own, test, others)


def textures(seed: int) -> Pictures:
    """Return patches of six textures, each with mean 0 and standard deviation 1, so that brightness gives no hint."""
    generator = np.random.default_rng(seed)
    parts: list[list[Tensor]] = [[], []]
    for name in TEXTURES:
        grey = _grey(name)
        down, across = (range(0, length - BLOCK + 1, BLOCK) for length in grey.shape)
        corners = generator.permutation([(y, x) for y in down for x in across])
        held_out = round(HELD_OUT * len(corners))
        regions = (corners[held_out:], PATCHES_TRAINED), (corners[:held_out], PATCHES_TESTED)
        for number, (blocks, wanted) in enumerate(regions):
            count = math.ceil(wanted / len(TEXTURES))
            places = generator.choice(blocks, 2 * count) + generator.integers(0, BLOCK - SIDE + 1, (2 * count, 2))
            patches = [grey[y : y + SIDE, x : x + SIDE] for y, x in places]
            patches = [patch for patch in patches if patch.std() > FLAT][:count]
            parts[number].append(torch.tensor(np.stack(patches), dtype=torch.float32)[:, None])
    labels = [torch.arange(len(TEXTURES)).repeat_interleave(len(own[0])) for own in parts]
    train, test = (_scaled(torch.cat(own)) for own in parts)
    return Pictures(train, labels[0], test, labels[1])


def faces(seed: int) -> Pictures:
    """Return faces and other patches, each with mean 0 and standard deviation 1; the seed chooses the fold."""
    import skimage.data  # noqa: PLC0415  (slow to import)
    from sklearn.model_selection import StratifiedKFold  # noqa: PLC0415

    patches = torch.tensor(skimage.data.lfw_subset(), dtype=torch.float32)[:, None]
    patches = _scaled(F.interpolate(patches, (SIDE, SIDE), mode="bicubic"))
    labels = torch.tensor([1] * FACES + [0] * (len(patches) - FACES))
    turn, fold = divmod(seed, FOLDS)
    train, test = list(StratifiedKFold(FOLDS, shuffle=True, random_state=turn).split(labels, labels))[fold]
    return Pictures(patches[train], labels[train], patches[test], labels[test])


def _scaled(pictures: Tensor) -> Tensor:
    """Return each picture with mean 0 and standard deviation 1."""
    return (pictures - pictures.mean((1, 2, 3), True)) / pictures.std((1, 2, 3), keepdim=True)


def _grey(name: str) -> np.ndarray:
    import skimage.data  # noqa: PLC0415  (slow to import)

    picture = getattr(skimage.data, name)().astype(np.float32) / 255
    return picture if picture.ndim == 2 else picture.mean(2)


SOURCES: dict[str, Callable[[int], Pictures]] = {"digits": digits, "textures": textures, "faces": faces}


def load(name: str, seed: int, device: torch.device) -> Pictures:
    """Return the pictures of a source, split by the seed."""
    return Pictures(*(part.to(device) for part in SOURCES[name](seed)))


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images, each randomly shifted, rotated and scaled a little."""
    drawn = torch.rand(4, len(images), generator=generator).to(images.device) * 2 - 1
    shift = drawn[:2] * SHIFT * 2  # coordinates range from -1 to 1
    angle, scale = drawn[2] * math.radians(TURN), 1 + drawn[3] * SCALE
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    turned = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], 1).view(-1, 2, 3)
    where = F.affine_grid(turned, list(images.shape), align_corners=False)
    return F.grid_sample(images, where, align_corners=False, padding_mode="border")
