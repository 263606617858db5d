# SPDX-License-Identifier: MIT
"""Expected outputs of a case and how far rounding may move them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SINGLE = torch.finfo(torch.float32).eps
# Cosines of unit vectors in float32 differ by a few roundings a channel between orders of summation.
COSINE_BAND = 4e-6

Check = Callable[[tuple[Tensor, ...]], "str | None"]


class Output(NamedTuple):
    """An expected output: `value` exactly, or in float64 with a bound on the absolute error of each entry."""

    name: str
    value: Tensor
    dtype: torch.dtype
    bound: Tensor | float | None = None
    where: Tensor | None = None  # the entries that are specified; None for all


def exactly(name: str, value: Tensor, dtype: torch.dtype | None = None, where: Tensor | None = None) -> Output:
    """Expect `value`, rounded once to `dtype`."""
    dtype = value.dtype if dtype is None else dtype
    return Output(name, value.to(dtype), dtype, None, where)


def closely(
    name: str, value: Tensor, magnitude: Tensor, terms: float, dtype: torch.dtype, factors: torch.dtype | None = None
) -> Output:
    """Expect `value` (float64), rounded to `dtype` after a sum in float32.

    `magnitude` is the sum of the absolute terms, `terms` the number of roundings of each, and `factors` the dtype to
    which kernels may round the factors of a term.
    """
    limits = torch.finfo(dtype)
    # GPUs may flush subnormal float32, but not float16.
    floor = limits.smallest_normal * (limits.eps if dtype == torch.float16 else 1.0)
    inner = torch.finfo(factors).eps if factors is not None else 0.0
    bound = limits.eps * value.abs() + (SINGLE * (terms + 2) + inner) * magnitude + floor
    return Output(name, value, dtype, bound)


def absent(name: str) -> Output:
    """Expect a float32 tensor without entries: an output that was not asked for."""
    return exactly(name, torch.empty(0))


def doubled(arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Return the arguments with floating tensors in float64."""
    return tuple(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments)


def heads_last(tensor: Tensor) -> Tensor:
    """Swap heads and tokens, as the results of attention lie in memory."""
    return tensor.transpose(1, 2)


def weight_roundings(q: Tensor, k: Tensor, scale: float) -> float:
    """Return how many float32 roundings an attention weight has until all weights are added up.

    A score of s has about 2 s of them. Kernels add up blocks of keys, and then the blocks.
    """
    highest = float((q.abs() @ k.abs().transpose(-2, -1)).detach().nan_to_num(0).max()) * abs(scale)
    return 2 * highest + 24 + k.shape[-2] / 24


def factor(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Raise weights to the smallest normal number of `dtype`, whose rounding error those below it share."""
    return weights.clamp(min=torch.finfo(dtype).smallest_normal)


def expect(build: Callable[[], Sequence[Output]]) -> Check:
    """Return a check against the outputs that `build` computes, at the first call."""
    expected = functools.cache(build)

    def check(outputs: tuple[Tensor, ...]) -> str | None:
        want = expected()
        if len(outputs) != len(want):
            return f"expected {len(want)} outputs, got {len(outputs)}"
        return next((error for pair in zip(outputs, want, strict=True) if (error := mismatch(*pair))), None)

    return check


def mismatch(got: Tensor, want: Output) -> str | None:
    """Describe the first entry of `got` that is wrong; None if all are right. NaN equals NaN."""
    if got.shape != want.value.shape or got.dtype != want.dtype:
        shapes = f"{want.dtype} {tuple(want.value.shape)}, got {got.dtype} {tuple(got.shape)}"
        return f"{want.name}: expected {shapes}"
    right = (got == want.value) | ((got != got) & (want.value != want.value))  # noqa: PLR0124
    if want.bound is not None:
        right |= want.value.isfinite() & ((got.double() - want.value).abs() <= want.bound)
    if want.where is not None:
        right |= ~want.where
    if right.all():
        return None
    wrong = (~right).nonzero()
    at = tuple(wrong[0].tolist())
    text = f"{want.name}{list(at)}: expected {want.value[at].item()!r}, got {got[at].item()!r}"
    if want.bound is not None:
        bound = want.bound[at].item() if isinstance(want.bound, Tensor) else want.bound
        text += f", bound {bound:.3g}"
    return f"{text} ({len(wrong)} of {got.numel()} entries are wrong)"


def map_outputs(views: Sequence[Tensor]) -> list[Output]:
    """Expect both views of a token map, exactly."""
    return [exactly(name, view) for name, view in zip(("dest", "members", "begin", "count"), views, strict=True)]
