# SPDX-License-Identifier: MIT
"""Merge: a segment reduce along a token map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.reference import merge as reference
from tokred_kernels.backends.registration import register
from tokred_kernels.checks import check_choice, check_floating, check_same_device, check_tokens, is_per_row, shape
from tokred_kernels.dtypes import accumulator_of
from tokred_kernels.ops.autograd import Function, forbid_double_backward, is_differentiated
from tokred_kernels.token_map import TokenMap

REDUCES = ("mean", "sum", "amax", "max")
VIEW_RULES = {"members": "int32 (B * N,)", "begin": "int32 (B, M)"}


def merge(x: Tensor, token_map: TokenMap, *, reduce: str = "mean", weight: Tensor | None = None) -> Tensor:
    """Reduce the tokens that share a slot to one token.

    Args:
        x: (B, N, C), or (T, C) if the map takes packed tokens.
        token_map: from N tokens to N' slots.
        reduce: "mean", "sum", or "amax" ("max" is the same). With weights w, mean is sum(w x) / sum(w) and sum is
            sum(w x). Sums are kept in float32 (float64 for float64) and rounded once.
        weight: (B, N) or (B, N, 1), or (T,) or (T, 1), float32 for every dtype of x (other floats are converted); not
            with "amax".

    Returns:
        (B, N', C), or (T', C) from a packed map, in x's dtype. A slot without members is 0, as is the mean of a slot
        whose weights sum to 0; their gradients are 0 too. In all other slots a NaN gives NaN. The values of dropped
        tokens reach neither the result nor a gradient.

    Differentiable once in `x` and `weight`. "amax" divides its gradient evenly among the members that tie.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes, an unknown `reduce`, a weight with "amax", or tensors on several devices.
        RuntimeError: the backend requested by name cannot run the call.

    One pass: reads `x` once and writes the result once.
    """
    check_against_map("merge", x, token_map)
    check_choice("merge", "reduce", reduce, REDUCES)
    if reduce == "max":
        reduce = "amax"
    if weight is not None:
        if reduce == "amax":
            raise ValueError('tokred_kernels.merge: weight must be None with reduce="amax": a maximum has no weights')
        weight = prepare_weight("merge", "weight", weight, x)
    return segment_reduce(x, token_map, weight, reduce, weight_sum=False)[0]


def check_map(op: str, token_map: Any) -> None:
    """Raise TypeError unless `token_map` is a TokenMap."""
    if not isinstance(token_map, TokenMap):
        raise TypeError(f"tokred_kernels.{op}: token_map must be a TokenMap, got {type(token_map).__name__}")


def check_against_map(op: str, x: Any, token_map: Any) -> None:
    """Raise unless x is (B, N, C), or (T, C), with the map's B, N, or T, and device."""
    check_map(op, token_map)
    check_tokens(op, "x", x, packed=token_map.packed_in is not None)
    if x.shape[:-1] != token_map.dest.shape:
        raise ValueError(
            f"tokred_kernels.{op}: token_map must be made for x's tokens: x is {shape(x)}, "
            f"the map takes {(*token_map.in_shape, 'C')}"
        )
    check_same_device(op, "token_map", token_map.dest, "x", x)


def prepare_weight(op: str, name: str, weight: Any, x: Tensor) -> Tensor:
    """Return the weight as a contiguous (B, N), or (T,), in the dtype of sums; differentiable."""
    check_floating(op, name, weight)
    rows = x.shape[:-1]
    if not is_per_row(weight, rows):
        raise ValueError(
            f"tokred_kernels.{op}: {name} must be {tuple(rows)} or {(*rows, 1)} as x is {shape(x)}, got {shape(weight)}"
        )
    check_same_device(op, name, weight, "x", x)
    accumulator = accumulator_of(x)
    if weight.dtype != accumulator:
        weight = weight.to(accumulator)
    if weight.dim() == x.dim():
        weight = weight.squeeze(-1)
    return weight if weight.is_contiguous() else weight.contiguous()


def segment_reduce(
    x: Tensor, token_map: TokenMap, weight: Tensor | None, reduce: str, weight_sum: bool
) -> tuple[Tensor, Tensor | None]:
    """Merge without checks; return y (B, N', C), and the sum of weights (B, N') if `weight_sum`, else None."""
    if token_map.packed is not None:
        flat_weight = None if weight is None else weight.view(1, -1)
        one = x.flatten(0, -2)[None], token_map.as_rows(), flat_weight
        y, total = segment_reduce(*one, reduce, weight_sum)
        return y[0], None if total is None else total[0]
    differentiated = is_differentiated(x, weight)
    backend = backends.choose("merge", x, training=differentiated)
    if backend == "reference":
        return reference.merge(x, weight, token_map.dest, token_map.num_out, reduce, weight_sum)
    members, begin, count = token_map.views()
    if differentiated:
        y, total = _Merge.apply(x, weight, token_map.dest, members, begin, count, reduce, weight_sum, backend)
    else:
        y, total = _merge(x, weight, members, begin, count, reduce, weight_sum, backend)
    return y, total if weight_sum else None


class _Merge(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        dest: Tensor,
        members: Tensor,
        begin: Tensor,
        count: Tensor,
        reduce: str,
        weight_sum: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        need_weight = weight is not None and ctx.needs_input_grad[1]
        y, total = _merge(x, weight, members, begin, count, reduce, weight_sum or weight is not None, backend)
        keep_x = x if need_weight or reduce == "amax" else None
        keep_y = y if (need_weight and reduce == "mean") or reduce == "amax" else None
        keep_total = None if weight is None else total
        ctx.save_for_backward(keep_x, keep_y, weight, keep_total, dest, members, begin, count)
        ctx.reduce, ctx.backend, ctx.weight_sum = reduce, backend, weight_sum
        if not need_weight:  # the sums of weights do not depend on x
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        x, y, weight, total, dest, members, begin, count = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        if not (need_weight and ctx.weight_sum):
            grad_total = None
        with torch.no_grad():
            grad_x, grad_weight = _merge_backward(
                *(grad_y, grad_total, x, y, weight, total, dest, members, begin, count),
                *(ctx.reduce, need_x, need_weight, ctx.backend),
            )
        grad_x = forbid_double_backward("merge", grad_x, grad_y) if need_x else None
        grad_weight = forbid_double_backward("merge", grad_weight, grad_y) if need_weight else None
        return grad_x, grad_weight, None, None, None, None, None, None, None


def _fake(
    x: Tensor,
    weight: Tensor | None,
    members: Tensor,
    begin: Tensor,
    count: Tensor,
    reduce: str,
    weight_sum: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return fake_merge(x, begin, weight_sum)


def fake_merge(x: Tensor, begin: Tensor, weight_sum: bool) -> tuple[Tensor, Tensor]:
    """Return empty results of a merge of x along a map whose `begin` is (B, N'), of the right shapes and dtypes."""
    accumulator = accumulator_of(x)
    y = x.new_empty((*begin.shape, x.shape[2]))
    return y, x.new_empty(begin.shape if weight_sum else (0,), dtype=accumulator)


def _backward_fake(
    grad_y: Tensor,
    grad_weight_sum: Tensor | None,
    x: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    weight_sum: Tensor | None,
    dest: Tensor,
    members: Tensor,
    begin: Tensor,
    count: Tensor,
    reduce: str,
    need_x: bool,
    need_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    accumulator = accumulator_of(grad_y)
    return (
        grad_y.new_empty((*dest.shape, grad_y.shape[2]) if need_x else (0,)),
        grad_y.new_empty(dest.shape if need_weight else (0,), dtype=accumulator),
    )


_merge = register(
    "merge(Tensor x, Tensor? weight, Tensor members, Tensor begin, Tensor count, str reduce, bool weight_sum, "
    "str backend) -> (Tensor y, Tensor weight_sum)",
    _fake,
    {
        "x": "float (B, N, C)",
        "weight": "sums (B, N)",
        **VIEW_RULES,
        "count": "int32 (B, M); segments(members, begin, count, B * N)",
        "reduce": "reduce in ('mean', 'sum') or (reduce == 'amax' and weight is None)",
    },
)
_merge_backward = register(
    "merge_backward(Tensor grad_y, Tensor? grad_weight_sum, Tensor? x, Tensor? y, Tensor? weight, Tensor? weight_sum, "
    "Tensor dest, Tensor members, Tensor begin, Tensor count, str reduce, bool need_x, bool need_weight, "
    "str backend) -> (Tensor grad_x, Tensor grad_weight)",
    _backward_fake,
    {
        "grad_y": "float (B, M, C)",
        "grad_weight_sum": "sums (B, M)",
        "x": "float (B, N, C)",
        "y": "dense (B, M, C)",
        "weight": "sums (B, N)",
        "weight_sum": "sums (B, M)",
        "dest": "int32 (B, N); entries(dest, -1, M)",
        **VIEW_RULES,
        "count": "int32 (B, M); segments(members, begin, count, B * N, dest)",
        "reduce": "reduce in ('mean', 'sum') and (weight is None or weight_sum is not None) or"
        " (reduce == 'amax' and weight is None and x is not None and y is not None)",
        "need_weight": "not need_weight or"
        " (weight is not None and x is not None and (reduce == 'sum' or y is not None))",
    },
)
