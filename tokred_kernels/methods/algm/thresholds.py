# SPDX-License-Identifier: MIT
"""The result of ALGM's calibration: how similar the tokens of each layer are."""

from __future__ import annotations

import os
import re
import reprlib
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

from tokred_kernels.checks import shown
from tokred_kernels.files import check_fields, check_number, read_json, replace_json

VERSION = 2  # of the JSON file; version 1 counted layers from 1
LAYER: tuple[type, float, float] = (int, 0, 2**63 - 1)
COUNT: tuple[type, float, float] = (int, 1, 2**63 - 1)
COSINE = 1 + 1e-6  # the largest, with rounding
RANGES = {"mean": (float, -COSINE, COSINE), "std": (float, 0, COSINE), "pairs": COUNT}


class Similarity(NamedTuple):
    """How similar the tokens of one layer are.

    Attributes:
        mean: the mean cosine of all pairs.
        std: the standard deviation of these cosines, without Bessel's correction.
        pairs: the number of pairs; each counts once.
    """

    mean: float
    std: float
    pairs: int


@dataclass(frozen=True, repr=False)
class Thresholds:
    """The result of `calibrate_thresholds`: how similar the tokens of each layer are; layers count from 0.

    Attributes:
        layers: a Similarity for each layer, in ascending order.
        window: the windows in which pairs were formed, (height, width); None for all pairs of an image.

    Raises:
        TypeError: `layers` is not a dict of Similarity.
        ValueError: `layers` is empty or does not ascend, or a number is NaN or out of range.
    """

    layers: dict[int, Similarity]
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_values("tokred_kernels.Thresholds:", self.layers, self.window)

    def threshold(self, layer: int) -> float:
        """Return mean + standard deviation of the layer's cosines; above 1, nothing merges.

        Raises:
            ValueError: the layer was not calibrated.
        """
        if not isinstance(layer, Integral) or layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise ValueError(f"tokred_kernels.Thresholds: layer must be one of {known}, got {shown(layer)}")
        return self.layers[layer].mean + self.layers[layer].std

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the thresholds as JSON, in one step; `load` returns exactly the same numbers.

        Raises:
            OSError: the file cannot be written; an old one is unchanged.
            ValueError: `layers` was changed to something that the class does not accept.
        """
        self.__post_init__()
        layers = {str(layer): similarity._asdict() for layer, similarity in self.layers.items()}
        replace_json(path, {"version": VERSION, "window": self.window, "layers": layers})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Thresholds:
        """Read a file that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not JSON, has another version, a missing or unknown field, or a wrong value.
        """
        where = f"tokred_kernels.Thresholds.load: {os.fspath(path)}:"
        content = read_json(where, path)
        version = content.get("version") if isinstance(content, dict) else None
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f"{where} version must be {VERSION}, which counts layers from 0, got {reprlib.repr(version)}; "
                "calibrate again"
            )
        check_fields(where, content, ("version", "window", "layers"))
        layers, window = content["layers"], content["window"]
        if not isinstance(layers, dict):
            raise ValueError(f"{where} layers must be an object, got {reprlib.repr(layers)}")
        for name, entry in layers.items():
            if not re.fullmatch("0|[1-9][0-9]{0,17}", name):
                raise ValueError(f"{where} layers must be named by numbers from 0, got {reprlib.repr(name)}")
            check_fields(f"{where} layer {name}", entry, Similarity._fields)
        read = {int(name): Similarity(**entry) for name, entry in layers.items()}
        window = tuple(window) if isinstance(window, list) else window
        _check_values(where, read, window)
        return cls(read, window)

    def __repr__(self) -> str:
        lines = [
            f"  {layer}: {self.threshold(layer):.4f} = {mean:.4f} + {std:.4f} over {pairs:,} pairs"
            for layer, (mean, std, pairs) in self.layers.items()
        ]
        where = "all pairs" if self.window is None else f"pairs in windows of {self.window[0]} x {self.window[1]}"
        return "\n".join([f"Thresholds(layer: mean + std of the cosines of {where}", *lines]) + ")"


def _check_values(where: str, layers: Any, window: Any) -> None:
    """Raise TypeError or ValueError unless these can be the fields of a Thresholds."""
    if not isinstance(layers, dict) or not all(isinstance(entry, Similarity) for entry in layers.values()):
        raise TypeError(f"{where} layers must be a dict of Similarity, got {shown(layers)}")
    if not layers:
        raise ValueError(f"{where} layers must have at least one layer, got none")
    for layer, similarity in layers.items():
        check_number(f"{where} a layer", layer, *LAYER)
        for name, value in similarity._asdict().items():
            check_number(f"{where} layer {layer}: {name}", value, *RANGES[name])
    for before, after in pairwise(layers):
        if after <= before:
            raise ValueError(f"{where} layers must ascend, got {after} after {before}")
    if window is not None:
        if not isinstance(window, tuple) or len(window) != 2:
            raise ValueError(f"{where} window must be two ints or null, got {shown(window)}")
        for length in window:
            check_number(f"{where} window", length, *COUNT)
