# SPDX-License-Identifier: MIT
"""Cases of lookup_gather, lookup_scatter and their backwards, against all weights in memory, in float64."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred_kernels.backends.reference.lookup_gather import lookup_gather, lookup_scores
from tokred_kernels.backends.reference.lookup_scatter import lookup_scatter
from tokred_kernels.backends.selfcheck.cases import compare, inputs


class Call(NamedTuple):
    """q (B, H, M, d), k and v (B, H, N, d), values (B, H, M, d) to scatter, and the scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    values: Tensor
    scale: float


def _weights(q: Tensor, k: Tensor, scale: float, lse: Tensor | None = None) -> Tensor:
    scores = lookup_scores(q, k, scale)
    return scores.softmax(-1) if lse is None else (scores - lse[..., None]).exp()


def _gathered(arguments: tuple[Any, ...]) -> list[compare.Output]:
    dtype = arguments[0].dtype
    q, k, v, scale = compare.doubled(arguments)
    out, lse = reference_call("lookup_gather", (q, k, v, scale))
    magnitude = compare.heads_last(compare.factor(_weights(q, k, scale), dtype) @ v.abs())
    roundings = compare.weight_roundings(q, k, scale)
    bound = roundings * compare.SINGLE
    return [
        compare.closely("out", out, magnitude, roundings, dtype, dtype),
        compare.Output("lse", lse, torch.float32, bound),
    ]


def _scattered(arguments: tuple[Any, ...]) -> list[compare.Output]:
    dtype = arguments[0].dtype
    q, k, v, lse, scale = compare.doubled(arguments)
    (out,) = reference_call("lookup_scatter", (q, k, v, lse, scale))
    magnitude = compare.heads_last(compare.factor(_weights(q, k, scale, lse), dtype).transpose(-2, -1) @ v.abs())
    return [compare.closely("out", out, magnitude, compare.weight_roundings(q, k, scale), dtype, dtype)]


def _gather_gradients(arguments: tuple[Any, ...]) -> list[compare.Output]:
    grad_out, grad_lse, q, k, v, _, _, scale = compare.doubled(arguments)
    weights, g = _weights(q, k, scale), compare.heads_last(grad_out).abs()
    reached = g @ v.abs().transpose(-2, -1)
    moved = reached + (weights * reached).sum(-1, keepdim=True)
    if grad_lse is not None:
        moved = moved + grad_lse.abs()[..., None]
    weights, moved = (compare.factor(part, arguments[2].dtype) for part in (weights, weights * moved))
    return _vectors("lookup_gather_backward", arguments, q, k, scale, moved, weights.transpose(-2, -1) @ g)


def _scatter_gradients(arguments: tuple[Any, ...]) -> list[compare.Output]:
    grad_out, q, k, v, lse, scale = compare.doubled(arguments)
    weights, g = _weights(q, k, scale, lse), compare.heads_last(grad_out).abs()
    moved = weights * (v.abs() @ g.transpose(-2, -1))
    weights, moved = (compare.factor(part, arguments[1].dtype) for part in (weights, moved))
    return _vectors("lookup_scatter_backward", arguments, q, k, scale, moved, weights @ g)


def _vectors(
    op: str, arguments: tuple[Any, ...], q: Tensor, k: Tensor, scale: float, moved: Tensor, of_v: Tensor
) -> list[compare.Output]:
    """Gradients by autograd in float64; `moved` has the absolute terms of the gradients of the scores."""
    dtype, roundings = arguments[0].dtype, compare.weight_roundings(q, k, scale)
    exact = reference_call(op, compare.doubled(arguments))
    sizes = [moved @ k.abs() * abs(scale), moved.transpose(-2, -1) @ q.abs() * abs(scale), of_v]
    outputs = [
        compare.closely(name, value, compare.heads_last(size), roundings, dtype, dtype)
        for name, value, size in zip(("grad_q", "grad_k", "grad_v"), exact, sizes, strict=False)
    ]
    if len(exact) > len(sizes):
        outputs.append(compare.closely("grad_lse", exact[3], moved.sum(-1), roundings, torch.float32, dtype))
    return outputs


def _call(draw: inputs.Draw, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Call:
    images, heads, compressed, number, channels = shape
    make = inputs.HEAD_LAYOUTS[layout]
    rows = compressed, number, number, compressed
    q, k, v, values = (make(draw.normal(images, heads, count, channels).to(dtype)) for count in rows)
    return Call(q, k, v, values, 1 / math.sqrt(channels))


def _arguments(op: str, draw: inputs.Draw, call: Call, out: Tensor, lse: Tensor) -> tuple[Any, ...]:
    """The arguments of `op`, where the gather of the call gives `out` (B, H, M, d) and `lse`."""
    q, k, v, values, scale = call
    if op == "lookup_gather":
        return q, k, v, scale
    if op == "lookup_scatter":
        return q, k, values, lse, scale
    like = compare.heads_last(out if op == "lookup_gather_backward" else k)
    grad_out = inputs.HEAD_LAYOUTS["offset"](draw.normal(*like.shape).to(q.dtype))
    if op == "lookup_scatter_backward":
        return grad_out, q, k, values, lse, scale
    grad_lse = draw.normal(*lse.shape) if draw.integers(0, 2, 1).item() else None
    return grad_out, grad_lse, q, k, v, compare.heads_last(out).contiguous(), lse, scale


_EXPECTED = {
    "lookup_gather": _gathered,
    "lookup_scatter": _scattered,
    "lookup_gather_backward": _gather_gradients,
    "lookup_scatter_backward": _scatter_gradients,
}


def cases(op: str, level: inputs.Level) -> Iterator[inputs.Case]:
    """The cases of `op`."""
    mixed = level.mix(
        compiled=("compressed", "channels", "layout"),
        number=level.sizes(1, 2, 17, 197, 577, 1089, 4100, interpreted=(1, 2, 17, 33, 60, 100, 300), deep=(65, 20000)),
        dtype=inputs.DTYPES,
        compressed=(5, 1, 25, 70, 1000),
        layout=tuple(inputs.HEAD_LAYOUTS),
        channels=inputs.CHANNELS,
        heads=(3, 1, 2),
    )
    for number, dtype, compressed, layout, channels, heads in mixed:
        large = number > (100 if level.interpreted else 1000)
        rows = min(compressed, number, 100 if large else number)
        images, heads = (1, 1) if large else (2, heads)  # noqa: PLW2901
        name = inputs.name_of(dtype, f"N={number} M={rows} ({compressed}) H={heads} C={channels} {layout}")
        draw = inputs.Draw(op, name)
        call = _call(draw, (images, heads, rows, number, channels), dtype, layout)
        arguments = _arguments(op, draw, call, *lookup_gather(*call[:3], call.scale))
        yield inputs.Case(name, arguments, compare.expect(functools.partial(_EXPECTED[op], arguments)))
    if not op.endswith("backward"):
        for dtype in inputs.DTYPES:
            name = inputs.name_of(dtype, "NaN in one key")
            draw = inputs.Draw(op, name)
            call = _call(draw, (2, 2, 4, 50, 33), dtype, "contiguous")
            call.k[1, 0, 7, 3] = torch.nan
            arguments = _arguments(op, draw, call, *lookup_gather(*call[:3], call.scale))
            yield inputs.Case(name, arguments, compare.expect(functools.partial(_EXPECTED[op], arguments)))


def reference_call(op: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The reference's outputs, as the kernels have them; gradients by autograd."""
    if op == "lookup_gather":
        out, lse = lookup_gather(*arguments)
        return compare.heads_last(out), lse
    if op == "lookup_scatter":
        return (compare.heads_last(lookup_scatter(*arguments)),)
    gather = op == "lookup_gather_backward"
    grad_out, grad_lse, tensors = (*arguments[:2], arguments[2:5]) if gather else (arguments[0], None, arguments[1:5])
    leaves = [t.detach().requires_grad_() for t in tensors]
    if not gather:
        q, k, v, lse = leaves
        grads = torch.autograd.grad(lookup_scatter(q, k, v, lse, arguments[-1]), leaves, compare.heads_last(grad_out))
        return (*map(compare.heads_last, grads[:3]), grads[3])
    q, k, v = leaves
    results, used = lookup_gather(q, k, v, arguments[-1]), 1 if grad_lse is None else 2
    grads = torch.autograd.grad(results[:used], leaves, (compare.heads_last(grad_out), grad_lse)[:used])
    return tuple(map(compare.heads_last, grads))


def timing_cases(op: str) -> Iterator[inputs.TimingCase]:
    """The lookups of LookupViT-B at a small and a large resolution."""
    shapes = ((32, 12, 25, 196, 64), (8, 12, 100, 1024, 64))
    for shape, dtype in itertools.product(shapes, inputs.TIMED_DTYPES):
        name = inputs.name_of(dtype, "x".join(map(str, shape)))
        draw = inputs.Draw(op, name)
        call = _call(draw, shape, dtype, "projected")
        lse = torch.full(shape[:3], math.log(shape[3]) + 0.5)
        yield inputs.TimingCase(name, dtype, _arguments(op, draw, call, call.values, lse))
