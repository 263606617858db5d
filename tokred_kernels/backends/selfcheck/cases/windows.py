# SPDX-License-Identifier: MIT
"""Cases of window_similarity and window_map."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokred_kernels.backends.reference.window_map import window_map
from tokred_kernels.backends.reference.window_similarity import mean_cosine, window_similarity
from tokred_kernels.backends.selfcheck.cases import compare, inputs
from tokred_kernels.windows import Windows

# A single window, the whole grid, a rim below, at the right and both; prefixes of 0, 1, 2 and 5; N from 2 to 4097.
WINDOWS = (
    Windows(0, 1, 2, 1, 2),
    Windows(1, 4, 4, 2, 2),
    Windows(2, 5, 3, 5, 3),
    Windows(1, 14, 14, 2, 2),
    Windows(5, 16, 12, 5, 2),
    Windows(1, 24, 24, 3, 4),
    Windows(0, 33, 33, 2, 1),
    Windows(1, 64, 64, 2, 2),
)
INTERPRETED = (*WINDOWS[:3], Windows(5, 7, 9, 2, 2))
DEEP = (Windows(1, 3, 40, 2, 7), Windows(0, 128, 128, 2, 2))


def _windows(level: inputs.Level) -> tuple[Windows, ...]:
    return INTERPRETED if level.interpreted else (*WINDOWS, *(DEEP if level.deep else ()))


def _text(windows: Windows) -> str:
    first, down, across, height, width = windows
    return f"N={windows.num_tokens()}={first}+{down}x{across} windows {height}x{width}"


def _gap(scores: Tensor) -> float:
    """A threshold far from all finite scores, near their median."""
    found = scores[scores > -torch.inf].round(decimals=6).unique()
    if found.numel() < 2:
        return 0.5
    # The gap next to the median that is widest.
    middle = slice(len(found) // 4, len(found) - len(found) // 4)
    some = found[middle] if len(found[middle]) > 1 else found
    widest = some.diff().argmax()
    return float(some[widest : widest + 2].mean())


def _similarities(x: Tensor, windows: Windows, threshold: float) -> list[compare.Output]:
    score = mean_cosine(x, windows, torch.float64)
    return [
        compare.Output("score", score, torch.float32, compare.COSINE_BAND),
        compare.exactly("counts", (score >= threshold).sum(1, dtype=torch.int32)),
    ]


def _similarity_cases(level: inputs.Level) -> Iterator[inputs.Case]:
    mixed = level.mix(
        windows=_windows(level),
        dtype=inputs.DTYPES,
        kind=("exact", "random"),
        channels=inputs.CHANNELS,
        layout=tuple(inputs.LAYOUTS),
    )
    for windows, dtype, kind, channels, layout in mixed:
        name = inputs.name_of(dtype, _text(windows), f"C={channels} {layout} {kind}")
        draw = inputs.Draw("window_similarity", name)
        shape = 2, windows.num_tokens(), channels
        x = draw.exact_tokens(*shape) if kind == "exact" else draw.normal(*shape)
        x[:, windows.first] = 0
        if windows.number() > 4:
            place = draw.orders(1, shape[1])[0]
            x[0, place[0], 1], x[1, place[1], 0] = torch.nan, torch.inf
        x = inputs.LAYOUTS[layout](x.to(dtype))
        threshold = _gap(mean_cosine(x, windows, torch.float64))
        if kind == "exact" and windows.size() == 2:  # the score is the cosine itself: reach it exactly
            threshold = float(mean_cosine(x, windows).median())
            threshold = threshold if threshold > -1 else 0.5
        arguments = x, windows, threshold
        yield inputs.Case(name, arguments, compare.expect(functools.partial(_similarities, *arguments)))


def _map_cases(level: inputs.Level) -> Iterator[inputs.Case]:
    mixed = level.compiled().mix(windows=_windows(level), share=(0.5, 0.0, 1.0), packed=(False, True), images=(2, 3, 1))
    for windows, share, packed, images in mixed:
        name = inputs.name_of(_text(windows), f"B={images} {share:.0%}", "packed" if packed else "")
        draw = inputs.Draw("window_map", name)
        number, gone = windows.number(), windows.size() - 1
        score = draw.integers(-4, 5, images, number) / 4.0
        score[draw.uniform(images, number) < 0.1] = -torch.inf
        r = int(number * share)
        arguments: tuple[Any, ...] = score, windows, r, None, None, 0
        if packed:  # as many windows in some images, others in others
            counts = (torch.tensor([r, number - r, number])[:images]).int()
            lengths = (windows.num_tokens() - gone * counts).tolist()
            arguments = score, windows, 0, counts, inputs.row_starts(lengths), sum(lengths)
        yield inputs.Case(name, arguments, compare.expect(functools.partial(_exact_map, arguments)))


def _exact_map(arguments: tuple[Any, ...]) -> list[compare.Output]:
    return compare.map_outputs(window_map(*arguments))


def cases(op: str, level: inputs.Level) -> Iterator[inputs.Case]:
    """The cases of `op`."""
    return _similarity_cases(level) if op == "window_similarity" else _map_cases(level)


def reference_call(op: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The reference's outputs, as the kernels have them."""
    return (window_similarity if op == "window_similarity" else window_map)(*arguments)


def timing_cases(op: str) -> Iterator[inputs.TimingCase]:
    """The grids of segmentation models (ALGM)."""
    shapes = ((16, 32, 384), (8, 64, 768))
    for (images, side, channels), dtype in itertools.product(shapes, inputs.TIMED_DTYPES):
        windows = Windows(1, side, side, 2, 2)
        name = inputs.name_of(dtype, f"{images}x{windows.num_tokens()}x{channels}")
        draw = inputs.Draw(op, name)
        if op == "window_similarity":
            yield inputs.TimingCase(
                name, dtype, (draw.normal(images, windows.num_tokens(), channels).to(dtype), windows, 0.9)
            )
        elif dtype == torch.float32:
            score = draw.uniform(images, windows.number())
            yield inputs.TimingCase(name, dtype, (score, windows, windows.number() // 2, None, None, 0))
