# SPDX-License-Identifier: MIT
"""The photographs of the experiments."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Photographs that the packages contain. scikit-image would download others.
INSIDE = {
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "skimage": ("data", ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")),
}
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")


def load(folder: Path | None) -> dict[str, Image.Image]:
    """Return the pictures of `folder`, or of scikit-learn and scikit-image, by name, in RGB.

    Prints the names of files that cannot be read.

    Raises:
        SystemExit: no picture was found.
    """
    paths = _packaged() if folder is None else _inside(folder)
    pictures: dict[str, Image.Image] = {}
    for path in paths:
        try:
            with Image.open(path) as file:
                picture = _in_rgb(ImageOps.exif_transpose(file))
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            print(f"skipped {path.name}, which cannot be read: {error}", file=sys.stderr)
            continue
        name, number = path.stem, 2
        while name in pictures:  # the same stem with a different extension
            name, number = f"{path.stem}-{number}", number + 1
        pictures[name] = picture
    if not pictures and folder is None:
        raise SystemExit(
            "No photographs: install scikit-learn or scikit-image (pip install scikit-learn scikit-image), or name a "
            "folder with --images."
        )
    if not pictures:
        raise SystemExit(f"--images {folder}: it has no readable picture ({', '.join(ENDINGS)}).")
    return pictures


def _in_rgb(picture: Image.Image) -> Image.Image:
    """Convert to RGB. For 16-bit grey, keep the upper 8 bits: Pillow's conversion would make it nearly white.

    Raises:
        ValueError: the mode does not define the value of white.
    """
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"mode {picture.mode!r} does not define the value of white")
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
        raise SystemExit(f"--images {folder}: the folder does not exist.")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
