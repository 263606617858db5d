# SPDX-License-Identifier: MIT
"""Read token counts for DiffRate: a file or a dict in the format of the published compression_rate.json."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from tokred_kernels.files import check_fields, check_number, read_json

PRUNE, MERGE = "prune_kept_num", "merge_kept_num"  # the keys of the published compression_rate.json
FIGURES = ("gflops", "target_gflops")  # further keys of a saved `FoundRates`
MOST = 2**31 - 1  # the largest count


def read_kept(owner: str, kept: Any) -> dict[str, Any]:
    """Return `kept`, a path or a dict, as a dict whose counts are lists of ints, or "None" for a stage without any.

    Raises:
        TypeError: `kept` is neither, or a count is not an int.
        ValueError: not JSON, a missing or unknown key, or a count that is out of range.
        OSError: the file cannot be read.
    """
    where = f"tokred_kernels.{owner}: kept"
    if isinstance(kept, (str, os.PathLike)):
        where = f"{where}, the file {os.fspath(kept)},"
        kept = read_json(where, kept)
    if not isinstance(kept, Mapping):
        raise TypeError(
            f'{where} must be a path, a dict with "{PRUNE}" and "{MERGE}", or None, got {type(kept).__name__}'
        )
    if PRUNE not in kept or MERGE not in kept:
        raise ValueError(
            f'{where} must have "{PRUNE}" and "{MERGE}", got '
            f"{'the keys ' + ', '.join(map(repr, kept)) if kept else 'no keys'}; of the published "
            'compression_rate.json, give one entry: json.load(file)["ViT-S-DeiT"]["2.9"]'
        )
    kept = dict(kept)
    check_fields(where, kept, (PRUNE, MERGE), FIGURES)
    for name in kept.keys() & FIGURES:
        check_number(f"{where} {name}", kept[name], float, 0, 1e9)
    prune, merged = (_counts(f"{where} {name}", kept[name]) for name in (PRUNE, MERGE))
    if "None" not in (prune, merged) and len(prune) != len(merged):
        raise ValueError(
            f"{where} {PRUNE} and {MERGE} must have one number for each block, got {len(prune)} and {len(merged)}"
        )
    return {**kept, PRUNE: prune, MERGE: merged}


def _counts(where: str, value: Any) -> list[int] | str:
    if isinstance(value, str):  # as published: a list in quotes, or "None" for a model without this stage
        if value == "None":
            return value
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{where} must be a list, got the text {reprlib.repr(value)}") from None
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{where} must be a list with one int per block, got {reprlib.repr(value)}")
    for index, number in enumerate(value):
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise TypeError(f"{where}[{index}] must be an int, got {reprlib.repr(number)}")
        if not 0 < int(number) <= MOST:
            raise ValueError(f"{where}[{index}] must be from 1 to {MOST}, got {reprlib.repr(number)}")
    return [int(number) for number in value]


def counts_of_blocks(kept: Mapping[str, Any], depth: int, num_prefix: int) -> tuple[list[int], list[int]]:
    """Return the counts after pruning and after merging for a model with `depth` blocks and `num_prefix` prefix tokens.

    Raises:
        ValueError: a list has another length, or a count leaves no patch.
    """
    lists = []
    for name in (PRUNE, MERGE):
        counts = [MOST] * depth if kept[name] == "None" else kept[name]
        if len(counts) != depth:
            raise ValueError(
                f"tokred_kernels.patch: kept {name} must have one number for each of {depth} blocks, got {len(counts)}"
            )
        for index, number in enumerate(counts):
            if number <= num_prefix:
                raise ValueError(
                    f"tokred_kernels.patch: kept {name}[{index}] must be at least {num_prefix + 1}, the prefix and one "
                    f"patch, got {number}"
                )
        lists.append(counts)
    return lists[0], lists[1]
