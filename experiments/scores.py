# SPDX-License-Identifier: MIT
"""Accuracy of classifiers over several seeds, and the table of results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pictures import Pictures
from torch import Tensor

LEGEND = """Accuracy: percent of the test pictures, the mean over the seeds; each seed has its own split, weights and
order of training. Change: relative to the plain model of the same seed; in brackets the smallest and largest. Tokens
left: after the last block; for LookupViT, the compressed tokens, while all others stay as well. GFLOPs: per image, a
multiply-add counts as two. Faster: median over rounds, relative to the plain model in the same round, for the models of
the first seed."""


class Variant(NamedTuple):
    """A row of the table: a model, or a model at one of its grids."""

    name: str
    forward: Callable[[Tensor], Tensor]
    tokens: tuple[float, ...]
    gflops: float


@torch.inference_mode()
def evaluate(variant: Variant, data: Pictures) -> dict[str, Any]:
    """Return a row: accuracy on the test pictures, tokens and operations."""
    right = (variant.forward(data.test).argmax(1) == data.test_labels).sum().item()
    return {
        "method": variant.name,
        "accuracy": 100 * right / len(data.test),
        "tokens": variant.tokens,
        "gflops": variant.gflops,
    }


def over_seeds(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the mean row of each method. A run has the rows of one seed; all runs have the same methods."""
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


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table of the README and docs/. The first row is the plain model."""
    first = rows[0]
    lines = [
        "| method | accuracy | change | tokens left | GFLOPs | fewer | images/s | faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        fewer = 1 - row["gflops"] / first["gflops"]
        changes = [own - plain for own, plain in zip(row["accuracies"], first["accuracies"], strict=True)]
        change = f"{row['accuracy'] - first['accuracy']:+.1f}"
        if min(changes) < max(changes):
            change += f" ({min(changes):+.1f} to {max(changes):+.1f})"
        lines.append(
            f"| {row['method']} | {row['accuracy']:.1f} % | {change} | "
            f"{row['tokens'][-1]:g} of {row['tokens'][0]:g} | {row['gflops']:.4f} | {fewer:.0%} | "
            f"{row['images_per_s']:.0f} | {row['speedup']:.2f}x |"
        )
    return "\n".join(lines)
