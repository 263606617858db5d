# SPDX-License-Identifier: MIT
"""The photographs that the examples run on."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Photographs inside the packages themselves; scikit-image downloads others, which are left alone.
INSIDE = {
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")),
}
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


def load(folder: Path | None) -> dict[str, Image.Image]:
    """Name and picture of each photograph, in RGB: of `folder`, or of those that scikit-learn and scikit-image have.

    Files that cannot be read are named on stderr and left out.

    Raises:
        SystemExit: there is none, with a line that says what to do.
    """
    paths = _packaged() if folder is None else _inside(folder)
    pictures: dict[str, Image.Image] = {}
    for path in paths:
        try:
            with Image.open(path) as file:
                picture = _in_rgb(ImageOps.exif_transpose(file))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            print(f"{path.name} is left out, it cannot be read: {error}", file=sys.stderr)
            continue
        name, number = path.stem, 2
        while name in pictures:  # the same stem with another ending
            name, number = f"{path.stem}-{number}", number + 1
        pictures[name] = picture
    if not pictures and folder is None:
        raise SystemExit(
            "No photographs: neither scikit-learn nor scikit-image is installed (pip install scikit-learn "
            "scikit-image). Or name a folder of your own with --images."
        )
    if not pictures:
        raise SystemExit(f"--images {folder}: no picture in it can be read ({', '.join(ENDINGS)} are looked for).")
    return pictures


def _in_rgb(picture: Image.Image) -> Image.Image:
    """Pillow's own conversion, but for grey of 16 bits, whose upper 8 are what is seen: Pillow makes it nearly white.

    Raises:
        ValueError: a mode whose white nobody knows.
    """
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"a picture of mode {picture.mode!r} does not say how bright white is")
    return picture.convert("RGB")


def _packaged() -> list[Path]:
    paths = []
    for package, (folder, names) in INSIDE.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            paths += [Path(spec.origin).parent / folder / name for name in names]
    return [path for path in paths if path.is_file()]


def _inside(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise SystemExit(f"--images {folder}: there is no such folder.")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
