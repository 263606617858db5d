# SPDX-License-Identifier: MIT
"""Command-line helpers, and the speed of models that take turns on the same images."""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.timing import Budget, event_visit, interleave, ratio, wall_visit

SAMPLE_SECONDS = 0.1  # shortest timing, so that the resolution of the clock does not matter
ROUNDS = 9


def positive(text: str) -> int:
    """Parse a whole number of 1 or more, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


def make_folder(path: Path) -> None:
    """Create the folder of --out."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {path}: cannot write there ({error.strerror})") from None


def choose_device(name: str) -> torch.device:
    """Return the device that --device names; "auto" is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise SystemExit(f"--device {name}: torch cannot use it here ({reason})") from None
    return device


def describe(device: torch.device) -> str:
    """Return the name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def in_turns(
    calls: Sequence[Callable[[], Any]],
    scopes: Sequence[Callable[[], AbstractContextManager[Any]]],
    device: torch.device,
    rounds: int,
    seconds: float,
) -> list[list[float]]:
    """Return seconds per call and round of each call, made inside its scope. No round starts after `seconds`."""
    make = event_visit if device.type == "cuda" else wall_visit
    visits = {}
    for number, (call, scope) in enumerate(zip(calls, scopes, strict=True)):
        with scope():
            turn = make(lambda _, call=call: call(), 1, SAMPLE_SECONDS)

        def visit(scope: Any = scope, turn: Any = turn) -> float:
            with scope():
                return turn()

        visits[str(number)] = visit
    return list(interleave(visits, Budget(rounds, SAMPLE_SECONDS, seconds)).values())


@torch.inference_mode()
def speeds(forwards: Sequence[Callable[[Tensor], Any]], images: Tensor, seconds: int) -> list[dict[str, float]]:
    """Return images per second of each, and its speed relative to the first."""
    calls = [lambda forward=forward: forward(images) for forward in forwards]
    times = in_turns(calls, [nullcontext] * len(calls), images.device, ROUNDS, seconds)
    return [{"images_per_s": len(images) / statistics.median(own), "speedup": ratio(times[0], own)} for own in times]


def print_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with aligned columns."""
    lines = [titles, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    print()
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
