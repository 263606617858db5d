# SPDX-License-Identifier: MIT
"""How good and how fast models are that name pictures: what is measured of each, over several seeds, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pictures import Pictures
from torch import Tensor

LEGEND = """Accuracy: percent of the test pictures; with several seeds the mean, each seed with pictures, beginnings and
order of its own, and in brackets the least and the greatest change from the plain model of the same seed. Tokens left:
after the last block; of LookupViT the compressed ones, beside which all others stay. GFLOPs: an image, a multiply-add
being two. Faster: median over rounds, each against the plain model in the same round, the first seed's models."""


class Variant(NamedTuple):
    """A row of the table: a model, or one way to run it."""

    name: str
    forward: Callable[[Tensor], Tensor]
    tokens: tuple[float, ...]
    gflops: float


@torch.inference_mode()
def evaluate(variant: Variant, data: Pictures) -> dict[str, Any]:
    """How many test pictures it names, with how many tokens and operations."""
    right = (variant.forward(data.test).argmax(1) == data.test_labels).sum().item()
    return {
        "method": variant.name,
        "accuracy": 100 * right / len(data.test),
        "tokens": variant.tokens,
        "gflops": variant.gflops,
    }


def over_seeds(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The mean row of each method over the runs, a run being the rows of one seed; all runs have the same methods."""
    return [
        {
            "method": rows[0]["method"],
            "accuracy": statistics.fmean(row["accuracy"] for row in rows),
            "accuracies": [row["accuracy"] for row in rows],
            "tokens": [statistics.fmean(left) for left in zip(*(row["tokens"] for row in rows), strict=True)],
            "gflops": statistics.fmean(row["gflops"] for row in rows),
        }
        for rows in zip(*runs, strict=True)
    ]


def changes(row: dict[str, Any], first: dict[str, Any]) -> list[float]:
    """By how many points each seed's accuracy differs from the plain model's of that seed."""
    return [own - plain for own, plain in zip(row["accuracies"], first["accuracies"], strict=True)]


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table that is printed, and stands in the README and docs/; its first row is the plain model."""
    first = rows[0]
    lines = [
        "| method | accuracy | change | tokens left | GFLOPs | fewer | images/s | faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        fewer = 1 - row["gflops"] / first["gflops"]
        each = changes(row, first)
        change = f"{row['accuracy'] - first['accuracy']:+.1f}"
        if min(each) < max(each):
            change += f" ({min(each):+.1f} to {max(each):+.1f})"
        lines.append(
            f"| {row['method']} | {row['accuracy']:.1f} % | {change} | "
            f"{row['tokens'][-1]:g} of {row['tokens'][0]:g} | {row['gflops']:.4f} | {fewer:.0%} | "
            f"{row['images_per_s']:.0f} | {row['speedup']:.2f}x |"
        )
    return "\n".join(lines)
