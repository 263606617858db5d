# SPDX-License-Identifier: MIT
"""Blocks that were measured to be faster than the tables': tuned.json, read, written, and put over the tables."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokred_kernels.backends.triton.configs_tables import KERNELS, PORTABLE, AttentionConfig, Table

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
    """What a config is for: heads of up to `width`, and more than the tables' next narrower width."""

    architecture: str
    kernel: str
    dtype: str
    width: int


def read(path: Path) -> dict[Place, AttentionConfig]:
    """What `write` wrote.

    Raises:
        ValueError: the file is not JSON, is of another schema, or has what no kernel can be launched with.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"it must be of schema {SCHEMA}")
        if not isinstance(content.get("configs"), list):
            raise ValueError('"configs" must be a list')
        tuned: dict[Place, AttentionConfig] = {}
        for number, entry in enumerate(content["configs"]):
            place, config = _entry(number, entry)
            if place in tuned:
                raise ValueError(f"configs[{number}] is for {place}, as one before it is")
            tuned[place] = config
    except ValueError as error:  # JSON's own errors are such too
        raise ValueError(f"tokred_kernels: {path}: {error}; delete it, or write it anew") from error
    return tuned


def write(path: Path, tuned: dict[Place, AttentionConfig]) -> None:
    """Write configs, a line each, in one order."""
    lines = (json.dumps(place._asdict() | _numbers(config)) for place, config in sorted(tuned.items()))
    path.write_text(f'{{"schema": {SCHEMA}, "configs": [\n' + ",\n".join(lines) + "\n]}\n")


def apply(tuned: dict[Place, AttentionConfig], tables: dict[str, Table]) -> None:
    """Put configs over those of `tables`; an architecture without a table gets a portable one."""
    for place, config in tuned.items():
        if place.architecture not in tables:
            tables[place.architecture] = {of: dict(by_width) for of, by_width in tables[PORTABLE].items()}
        tables[place.architecture][place.kernel, DTYPE_NAMES[place.dtype]][place.width] = config


def _entry(number: int, entry: Any) -> tuple[Place, AttentionConfig]:
    names = {*_PLACE, *ALLOWED}
    if not isinstance(entry, dict) or entry.keys() != names:
        raise ValueError(f"configs[{number}] must have {', '.join(sorted(names))}, got {entry!r}")
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
            raise ValueError(f"configs[{number}]: {name} must be {accepted}, got {value!r}")
    place = Place(*(entry[name] for name in _PLACE))
    return place, AttentionConfig(block_channels=place.width, **{name: entry[name] for name in ALLOWED})


def _numbers(config: AttentionConfig) -> dict[str, int]:
    return {name: value for name, value in dataclasses.asdict(config).items() if name in ALLOWED}
