# SPDX-License-Identifier: MIT
"""Inputs of the self-check: random but reproducible tensors, awkward layouts, and which sizes go with which others."""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred_kernels.backends.selfcheck.cases.compare import Check

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS = (8, 33, 64, 72)
# Kinds of token maps; see `Draw.dest`.
MAPS = ("spread", "few", "one", "dropped")
# Combinations for which Triton compiles anew, for each dtype.
MOST_COMPILED = 2
TIMED_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A call of an op and a check of its outputs.

    Attributes:
        name: unique within the op.
        arguments: CPU tensors with any strides and offsets, None, numbers, and NamedTuples that may hold tensors.
        check: takes the outputs on the CPU; returns None, or a sentence that says what is wrong.
    """

    name: str
    arguments: tuple[Any, ...]
    check: Check


@dataclass(frozen=True)
class TimingCase:
    """A call of ViT size, for timing: the values are plausible, the result is not checked."""

    name: str
    dtype: torch.dtype
    arguments: tuple[Any, ...]


class Level(NamedTuple):
    """The number and size of cases: few and small for the interpreter, many if `deep`."""

    interpreted: bool
    deep: bool

    def sizes(self, *sizes: int, interpreted: Sequence[int], deep: Sequence[int] = ()) -> tuple[int, ...]:
        """Return the token counts of this level."""
        return tuple(interpreted) if self.interpreted else (*sizes, *(deep if self.deep else ()))

    def compiled(self) -> Level:
        """Return the level of compiled kernels: the interpreter, too, runs kernels of integers fast."""
        return self._replace(interpreted=False)

    def mix(self, *, compiled: Sequence[str] = (), **axes: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        """Combine values of all axes: the product of the first two, with values of the others that cover most pairs.

        `deep` takes the product of the first three axes, the interpreter each value of the first axis twice. Triton
        compiles a kernel for each combination of the `compiled` axes, which takes most of the time of a check; so there
        are at most MOST_COMPILED for each value of the second axis, unless `deep`.
        """
        columns = [list(axes).index(name) for name in compiled]
        most = math.inf if self.deep or self.interpreted or not columns else MOST_COMPILED
        built: dict[Any, dict[tuple[Any, ...], None]] = {}
        values = list(axes.values())
        whole, rounds = (1, 2) if self.interpreted else (3 if self.deep else 2, 1)
        generator = random.Random(0)
        found: dict[tuple[Any, ...], None] = {}
        seen: set[Any] = set()

        def unseen(row: tuple[Any, ...]) -> set[Any]:
            return set(itertools.combinations(enumerate(row), 2)) - seen

        for chosen in list(itertools.product(*values[:whole])) * rounds:
            rows = [(*chosen, *(generator.choice(axis) for axis in values[whole:])) for _ in range(30)]
            known = built.setdefault(chosen[1:2], {})
            if len(known) >= most:
                rows = [self._with(row, columns, generator.choice(list(known))) for row in rows]
            best = max(rows, key=lambda row: len(unseen(row)))
            known[tuple(best[column] for column in columns)] = None
            seen |= unseen(best)
            found[best] = None
        yield from found

    @staticmethod
    def _with(row: tuple[Any, ...], columns: Sequence[int], values: Sequence[Any]) -> tuple[Any, ...]:
        new = dict(zip(columns, values, strict=True))
        return tuple(new.get(column, value) for column, value in enumerate(row))


class Draw:
    """Random tensors that depend on nothing but `seed`."""

    def __init__(self, *seed: object) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float32 numbers, which repeat in large tensors: PyTorch draws them on one thread."""
        number = math.prod(shape)
        drawn = torch.randn(min(number, 1_000_003), generator=self.generator)
        return drawn.repeat(-(-number // len(drawn)))[:number].view(shape) if number else drawn.view(shape)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers from 0 to 1."""
        return torch.rand(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers from `low` to `high` - 1, int64."""
        return torch.randint(low, high, shape, generator=self.generator)

    def orders(self, batch: int, number: int) -> Tensor:
        """A permutation of `number` for each image, (batch, number) int64."""
        return self.uniform(batch, number).argsort(1)

    def exact_tokens(self, *shape: int) -> Tensor:
        """Tokens (..., C) whose cosines have no rounding error in any dtype, so that many tie; some are zero.

        4^k entries are 1 or -1 times a power of two, so the norm is a power of two.
        """
        channels = shape[-1]
        nonzero = 4 ** ((channels.bit_length() - 1) // 2)
        signs = self.integers(0, 2, *shape) * 2.0 - 1
        signs[self.uniform(*shape).argsort(-1) >= nonzero] = 0
        scale = 2.0 ** self.integers(-2, 3, *shape[:-1], 1)
        return torch.where(self.uniform(*shape[:-1], 1) < 0.1, 0.0, signs * scale)

    def dest(self, batch: int, tokens: int, slots: int, kind: str) -> Tensor:
        """The slots (B, N) int32 of a map, some of them empty and some tokens dropped.

        `kind`: "spread" (any slot), "few" (all but a quarter of the tokens keep a slot of their own, as in merging),
        "one" (all in the last slot), "dropped" (most are dropped).
        """
        dest = self.integers(0, max(slots, 1), batch, tokens)
        if kind == "few":
            own = self.orders(batch, max(tokens, slots))[:, :tokens]
            dest = torch.where((own < slots) & (self.uniform(batch, tokens) < 0.75), own, dest)
        if kind == "one":
            dest.fill_(slots - 1)
        dropped = {"spread": 0.1, "few": 0.0, "one": 0.0, "dropped": 0.9}[kind]
        dest[self.uniform(batch, tokens) < dropped] = -1
        return (dest if slots else dest.fill_(-1)).int()


def _offset(tensor: Tensor) -> Tensor:
    """Put one element in front, so that no wide load is aligned."""
    return tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)


def _sliced(tensor: Tensor) -> Tensor:
    """Rows of a wider tensor, with NaN between them."""
    *rows, channels = tensor.shape
    return tensor.new_full((*rows, channels + 5), torch.nan)[..., 3 : channels + 3].copy_(tensor)


def _cropped(tensor: Tensor) -> Tensor:
    """Images of a tensor with more tokens, NaN between them."""
    *images, tokens, channels = tensor.shape
    return tensor.new_full((*images, tokens + 3, channels), torch.nan)[..., 1 : tokens + 1, :].copy_(tensor)


def _apart(tensor: Tensor) -> Tensor:
    """Every second channel of a tensor."""
    *rows, channels = tensor.shape
    return tensor.new_full((*rows, 2 * channels), torch.nan)[..., ::2].copy_(tensor)


def _projected(tensor: Tensor) -> Tensor:
    """Heads (B, H, N, d), or packed (T, H, d), of one projection of q, k and v: (B, N, 3, H, d)."""
    heads_last = tensor.transpose(1, 2) if tensor.dim() == 4 else tensor
    *rows, heads, channels = heads_last.shape
    own = tensor.new_full((*rows, 3, heads, channels), torch.nan).select(-3, 1).copy_(heads_last)
    return own.transpose(1, 2) if tensor.dim() == 4 else own


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "offset": _offset,
    "sliced": _sliced,
    "cropped": _cropped,
    "apart": _apart,
}
HEAD_LAYOUTS = {**LAYOUTS, "projected": _projected}


def name_of(*parts: object) -> str:
    """Join the parts of a case's name: a dtype without its module, words as they are, empty ones left out."""
    return " ".join(str(part).removeprefix("torch.") for part in parts if str(part))


def row_starts(lengths: Sequence[int]) -> Tensor:
    """Return the starts of images of these lengths in a packed tensor, and the end of the last one: (B + 1,) int32."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
