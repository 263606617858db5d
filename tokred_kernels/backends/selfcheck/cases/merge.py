# SPDX-License-Identifier: MIT
"""Cases of merge, merge_backward and unmerge.

Tokens, gradients and weights are small integers, so that sums and maxima are exact in any order and dtype; only
quotients are rounded.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokred_kernels.backends.reference.merge import merge
from tokred_kernels.backends.reference.to_csr import to_csr
from tokred_kernels.backends.reference.unmerge import unmerge
from tokred_kernels.backends.selfcheck.cases import compare, inputs

# The reduction, whether there are weights, and whether their sums are returned or, in the backward, have a gradient.
MODES = (
    ("sum", False, False),
    ("mean", True, True),
    ("amax", False, False),
    ("mean", False, True),
    ("sum", True, True),
    ("mean", True, False),
    ("sum", True, False),
)
SHARES = (0.5, 0.9, 1.3, 0.02)


class _Setting:
    """A map, its weights and the reduction along it."""

    def __init__(self, draw: inputs.Draw, number: int, share: float, kind: str, mode: tuple[str, bool, bool]) -> None:
        self.reduce, self.weighted, self.sums = mode
        self.slots = max(1, int(number * share))
        self.images = 2 if number < 1000 else 1
        self.dest = draw.dest(self.images, number, self.slots, kind)
        self.views = to_csr(self.dest, self.slots)
        self.weight = None
        if self.weighted:  # none in slot 0 counts, so that its mean is 0
            self.weight = torch.where(self.dest == 0, 0, draw.integers(1, 6, self.images, number)).float()


def _mixed(op: str, level: inputs.Level) -> Iterator[tuple[str, inputs.Draw, torch.dtype, int, str, _Setting]]:
    mixed = level.mix(
        number=level.sizes(1, 2, 17, 197, 577, 1089, 4097, interpreted=(1, 2, 9, 17, 33, 70, 197), deep=(20000,)),
        dtype=inputs.DTYPES,
        mode=MODES,
        kind=inputs.MAPS,
        layout=tuple(inputs.LAYOUTS),
        channels=inputs.CHANNELS,
        share=SHARES,
    )
    for number, dtype, mode, kind, layout, channels, share in mixed:
        words = mode[0] + ", weighted" * mode[1] + ", sums" * mode[2]
        name = inputs.name_of(dtype, f"N={number} C={channels} {layout} {kind}, {share:.0%} slots, {words}")
        draw = inputs.Draw(op, name)
        yield name, draw, dtype, channels, layout, _Setting(draw, number, share, kind, mode)


def _tokens(draw: inputs.Draw, setting: _Setting, channels: int, dtype: torch.dtype) -> Tensor:
    """Small integers, with a NaN, an infinity and its negative if there are other tokens."""
    images, number = setting.dest.shape
    x = draw.integers(-4, 5, images, number, channels).to(dtype)
    if number >= 9:
        place = draw.integers(0, number, 3)
        x[0, place[0], 0], x[-1, place[1], 1], x[-1, place[2], 2] = torch.nan, torch.inf, -torch.inf
    return x


def _merged(x: Tensor, setting: _Setting) -> list[compare.Output]:
    weight = None if setting.weight is None else setting.weight.double()
    reduce, slots = setting.reduce, setting.slots
    y, total = merge(x.double(), weight, setting.dest, slots, reduce, setting.sums)
    # Quotients may be products with a reciprocal.
    out = compare.closely("y", y, y.abs(), 2, x.dtype) if reduce == "mean" else compare.exactly("y", y.float(), x.dtype)
    return [
        out,
        compare.exactly("weight_sum", total, torch.float32) if total is not None else compare.absent("weight_sum"),
    ]


def _gradients(arguments: tuple[Any, ...]) -> list[compare.Output]:
    """The equations of csrc/common/args.h in float64."""
    grad_y, grad_sum, x, y, weight, total, dest, _, _, count, reduce, need_x, need_weight = compare.doubled(arguments)
    dtype, slot, kept = arguments[0].dtype, dest.clamp(min=0).long(), (dest >= 0)[..., None]
    rows = slot[..., None].expand(-1, -1, grad_y.shape[2])
    g = grad_y.gather(1, rows)
    w = torch.ones_like(g[..., 0]) if weight is None else weight
    divisor = torch.ones_like(w)
    if reduce == "mean":
        divisor = (count.double() if total is None else total).gather(1, slot)
    counted = kept & (divisor != 0)[..., None]
    divisor = torch.where(divisor == 0, 1.0, divisor)
    outputs = [compare.absent("grad_x")._replace(dtype=dtype), compare.absent("grad_weight")]
    if need_x and reduce == "amax":
        own = y.gather(1, rows)
        having = ((x == own) | (x.isnan() & own.isnan())) & kept
        ties = torch.zeros_like(y).scatter_add(1, rows, having.double()).gather(1, rows)
        value = torch.where(having, g / ties, 0.0)
    else:
        value = torch.where(counted, (w / divisor)[..., None] * g, 0.0)
    if need_x:
        exact = reduce == "sum"
        outputs[0] = (
            compare.exactly("grad_x", value, dtype)
            if exact
            else compare.closely("grad_x", value, value.abs(), 2, dtype)
        )
    if need_weight:
        dots, magnitude = (x * g).sum(-1), (x * g).abs().sum(-1)
        if reduce == "mean":  # the y that is passed is rounded
            share = y.gather(1, rows) * g
            dots, magnitude = (dots - share.sum(-1)) / divisor, (magnitude + share.abs().sum(-1)) / divisor
        dots, magnitude = (torch.where(counted[..., 0], part, 0.0) for part in (dots, magnitude))
        if grad_sum is not None:
            dots = dots + torch.where(kept[..., 0], grad_sum.gather(1, slot), 0.0)
        terms, factors = (x.shape[2], dtype) if reduce == "mean" else (0, None)
        outputs[1] = compare.closely("grad_weight", dots, magnitude + dots.abs(), terms, torch.float32, factors)
    return outputs


def _backward_cases(level: inputs.Level) -> Iterator[inputs.Case]:
    for i, (name, draw, dtype, channels, layout, setting) in enumerate(_mixed("merge_backward", level)):
        images, number = setting.dest.shape
        reduce, weight = setting.reduce, setting.weight
        x = draw.integers(-4, 5, images, number, channels).to(dtype)
        if reduce == "amax":
            x[0, 0, 0] = torch.nan
        grad_y = draw.integers(-4, 5, images, setting.slots, channels).to(dtype)
        need_weight = setting.weighted and i % 4 != 3
        need_x = not need_weight or i % 5 != 4
        results = merge(x, weight, setting.dest, setting.slots, reduce, setting.weighted)
        y, total = (None if part is None else part.contiguous() for part in results)
        grad_sum = draw.integers(-4, 5, images, setting.slots).float() if need_weight and setting.sums else None
        arguments = (
            inputs.LAYOUTS[layout](grad_y) if reduce == "sum" else grad_y,
            grad_sum,
            inputs.LAYOUTS[layout](x) if need_weight or reduce == "amax" else None,
            y if reduce == "amax" or (need_weight and reduce == "mean") else None,
            weight,
            total,
            inputs.LAYOUTS["offset"](setting.dest),
            *setting.views,
            *(reduce, need_x, need_weight),
        )
        needs = "x" * need_x + " and " * (need_x and need_weight) + "weight" * need_weight
        yield inputs.Case(f"{name}, of {needs}", arguments, compare.expect(functools.partial(_gradients, arguments)))


def _merge_cases(level: inputs.Level) -> Iterator[inputs.Case]:
    for name, draw, dtype, channels, layout, setting in _mixed("merge", level):
        x = inputs.LAYOUTS[layout](_tokens(draw, setting, channels, dtype))
        arguments = (x, setting.weight, *setting.views, setting.reduce, setting.sums)
        yield inputs.Case(name, arguments, compare.expect(functools.partial(_merged, x, setting)))
    yield from _packed_cases(level)


def _packed_cases(level: inputs.Level) -> Iterator[inputs.Case]:
    """Packed images reach the kernel as the rows of one: here one image is empty and one loses all its tokens."""
    for dtype, mode in itertools.product(inputs.DTYPES[:1] if level.interpreted else inputs.DTYPES, MODES[:3]):
        name = inputs.name_of(dtype, "packed", *mode)
        draw = inputs.Draw("merge", name)
        setting = _Setting(draw, 60, 0.5, "spread", mode)
        kept = ((9, 5), (0, 0), (11, 0), (40, 17))
        parts = [draw.dest(1, length, slots, "spread")[0] for length, slots in kept]
        firsts = itertools.accumulate((slots for _, slots in kept), initial=0)
        shifted = (torch.where(d < 0, -1, d + first) for d, first in zip(parts, firsts, strict=False))
        setting.dest = torch.cat(list(shifted))[None].int()
        setting.slots = sum(slots for _, slots in kept)
        setting.views = to_csr(setting.dest, setting.slots)
        setting.weight = None if setting.weight is None else setting.weight[:1].contiguous()
        x = _tokens(draw, setting, 72, dtype)
        arguments = (x, setting.weight, *setting.views, setting.reduce, setting.sums)
        yield inputs.Case(name, arguments, compare.expect(functools.partial(_merged, x, setting)))


def _unmerged(y: Tensor, dest: Tensor) -> list[compare.Output]:
    return [compare.exactly("x", unmerge(y, dest))]


def _unmerge_cases(level: inputs.Level) -> Iterator[inputs.Case]:
    for name, draw, dtype, channels, layout, setting in _mixed("unmerge", level):
        y = draw.normal(setting.images, setting.slots, channels).to(dtype)
        y[:, -1, 1], y[:, 0, 2] = torch.nan, torch.inf
        arguments = inputs.LAYOUTS[layout](y), inputs.LAYOUTS["offset"](setting.dest)
        yield inputs.Case(name, arguments, compare.expect(functools.partial(_unmerged, *arguments)))


def cases(op: str, level: inputs.Level) -> Iterator[inputs.Case]:
    """The cases of `op`."""
    return {"merge": _merge_cases, "merge_backward": _backward_cases, "unmerge": _unmerge_cases}[op](level)


def dest_of(members: Tensor, begin: Tensor, count: Tensor) -> Tensor:
    """Rebuild `dest` (B, N) of a map from its other view, in a few launches and without a read back to the host."""
    images = begin.shape[0]
    number = members.shape[0] // images
    first = (torch.arange(images, device=begin.device) * number)[:, None]
    place = torch.arange(number, device=begin.device, dtype=torch.int32).expand(images, -1).contiguous()
    slot = torch.searchsorted((begin - first).int(), place, right=True) - 1
    taken = place < (begin - first + count).gather(1, slot)
    # Members of no slot are dropped tokens; they write to a column that is cut off.
    token = torch.where(taken, members.view(images, number) - first, number)
    dest = slot.new_full((images, number + 1), -1).scatter(1, token.long(), slot)
    return dest[:, :number].int()


def reference_call(op: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The reference's outputs, as the kernels have them; gradients by autograd."""
    if op == "unmerge":
        return (unmerge(*arguments),)
    if op == "merge":
        x, weight, members, begin, count, reduce, sums = arguments
        y, total = merge(x, weight, dest_of(members, begin, count), begin.shape[1], reduce, sums)
        return y, x.new_empty(0, dtype=torch.float32) if total is None else total
    grad_y, grad_sum, x, _, weight, _, dest, _, begin, _, reduce, need_x, need_weight = arguments
    if x is None:
        x = grad_y.new_zeros(*dest.shape, grad_y.shape[2])
    x = x.detach().requires_grad_(need_x)
    weight = None if weight is None else weight.detach().requires_grad_(need_weight)
    y, total = merge(x, weight, dest, begin.shape[1], reduce, grad_sum is not None)
    leaves: list[Any] = [leaf for leaf, need in ((x, need_x), (weight, need_weight)) if need]
    used: Any = ([y], [grad_y]) if total is None else ([y, total], [grad_y, grad_sum])
    grads = iter(torch.autograd.grad(used[0], leaves, used[1]))
    none = grad_y.new_empty(0)
    return next(grads) if need_x else none, next(grads) if need_weight else none.float()


def timing_cases(op: str) -> Iterator[inputs.TimingCase]:
    """The merges of ViT-S, ViT-B and a diffusion model."""
    shapes = ((64, 197, 384, 181), (16, 577, 768, 554), (4, 4096, 320, 2096))
    for (images, number, channels, slots), dtype in itertools.product(shapes, inputs.TIMED_DTYPES):
        name = inputs.name_of(dtype, f"{images}x{number}x{channels}")
        draw = inputs.Draw(op, name)
        dest = draw.dest(images, number, slots, "few")
        views = to_csr(dest, slots)
        x, y = (draw.normal(images, rows, channels).to(dtype) for rows in (number, slots))
        weight = draw.integers(1, 6, images, number).float()
        if op == "merge":
            arguments: tuple[Any, ...] = x, weight, *views, "mean", True
        elif op == "unmerge":
            arguments = y, dest
        else:
            total = torch.ones(images, slots)
            arguments = y, None, None, None, weight, total, dest, *views, "mean", True, False
        yield inputs.TimingCase(name, dtype, arguments)
