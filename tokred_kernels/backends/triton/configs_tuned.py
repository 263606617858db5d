# SPDX-License-Identifier: MIT
"""Read and write tuned.json, the block sizes measured to be faster than those of the tables, and apply them."""

from __future__ import annotations

import dataclasses
import json
import re
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokred_kernels.backends.triton.configs_tables import KERNELS, PORTABLE, AttentionConfig, Table
from tokred_kernels.files import check_fields, read_json, replace_text

SCHEMA = 1
DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What each number of a config may be.
ALLOWED = {
    "block_queries": (16, 32, 64, 128, 256),
    "block_keys": (16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8, 16),
    "num_stages": tuple(range(1, 9)),
    "enough": range(1, 1 << 20),
}
_PLACE = ("architecture", "kernel", "dtype", "width")


class Place(NamedTuple):
    """The scope of a config: head dimensions up to `width`, and above the tables' next smaller width."""

    architecture: str
    kernel: str
    dtype: str
    width: int


def read(path: Path) -> dict[Place, AttentionConfig]:
    """Return the configs in a file that `write` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, has another schema, a missing or unknown field, a value that no kernel can be
            launched with, or two configs for one place.
    """
    try:
        content = read_json("it", path)
        if not isinstance(content, dict) or type(content.get("schema")) is not int or content["schema"] != SCHEMA:
            raise ValueError(f"it must be of schema {SCHEMA}")
        check_fields("it", content, ("schema", "configs"))
        if not isinstance(content["configs"], list):
            raise ValueError('"configs" must be a list')
        tuned: dict[Place, AttentionConfig] = {}
        for number, entry in enumerate(content["configs"]):
            place, config = _entry(number, entry)
            if place in tuned:
                raise ValueError(f"configs[{number}] is for {place}, as one before it is")
            tuned[place] = config
    except ValueError as error:
        raise ValueError(f"tokred_kernels: {path}: {error}; delete it, or write it anew") from error
    return tuned


def write(path: Path, tuned: dict[Place, AttentionConfig]) -> None:
    """Write the configs in sorted order, one a line, in one step.

    Raises:
        OSError: the file cannot be written; an old one is unchanged.
    """
    lines = (json.dumps(place._asdict() | _numbers(config)) for place, config in sorted(tuned.items()))
    replace_text(path, f'{{"schema": {SCHEMA}, "configs": [\n' + ",\n".join(lines) + "\n]}\n")


def apply(tuned: dict[Place, AttentionConfig], tables: dict[str, Table]) -> None:
    """Put configs over those of `tables`; an architecture without a table gets a portable one."""
    for place, config in tuned.items():
        if place.architecture not in tables:
            tables[place.architecture] = {of: dict(by_width) for of, by_width in tables[PORTABLE].items()}
        tables[place.architecture][place.kernel, DTYPE_NAMES[place.dtype]][place.width] = config


def _entry(number: int, entry: Any) -> tuple[Place, AttentionConfig]:
    check_fields(f"configs[{number}]", entry, sorted((*_PLACE, *ALLOWED)))
    architectures = re.fullmatch(r"sm_\d+|gfx\w+", str(entry["architecture"]))
    known = {
        "architecture": (entry["architecture"],) if architectures else ("sm_90, or another's name",),
        "kernel": KERNELS,
        "dtype": tuple(DTYPE_NAMES),
        "width": (16, 32, 64, 128),
        **ALLOWED,
    }
    for name, allowed in known.items():
        value = entry[name]
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value not in allowed:
            accepted = f"{allowed.start} to {allowed.stop - 1}" if isinstance(allowed, range) else f"one of {allowed}"
            raise ValueError(f"configs[{number}]: {name} must be {accepted}, got {reprlib.repr(value)}")
    place = Place(*(entry[name] for name in _PLACE))
    return place, AttentionConfig(block_channels=place.width, **{name: entry[name] for name in ALLOWED})


def _numbers(config: AttentionConfig) -> dict[str, int]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name in ALLOWED}
