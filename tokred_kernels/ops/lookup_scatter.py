# SPDX-License-Identifier: MIT
"""Lookup attention's scatter: lookup tokens receive from compressed tokens, by the weights of the gather."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.layout import heads_last
from tokred_kernels.backends.reference import lookup_scatter as reference
from tokred_kernels.backends.registration import register
from tokred_kernels.checks import check_floating, check_real, check_same_device, shape
from tokred_kernels.dtypes import accumulator_of
from tokred_kernels.ops.autograd import Function, distinct, forbid_double_backward, is_differentiated
from tokred_kernels.ops.lookup_gather import (
    LOOKUP_RULES,
    SHARES_BACKWARD,
    default_scale,
    heads_first,
    lookup_inputs,
    shared_inputs,
)

OP = "lookup_scatter"


def lookup_scatter(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *, scale: float | None = None) -> Tensor:
    """Return `A^T v` with the A of `lookup_gather`: N lookup tokens receive from M compressed tokens.

    (LookupViT, section 3.2, algorithm 3.) A is recomputed from q, k and `lse`, and never stored. One worker writes each
    row of the result, so results are deterministic.

    Args:
        q: (B, H, M, d), as in `lookup_gather`.
        k: (B, H, N, d), as in `lookup_gather`.
        v: (B, H, M, d), of the compressed tokens.
        lse: (B, H, M), from `lookup_gather`: float32, or float64 for float64.
        scale: as in `lookup_gather`.

    Returns:
        (B, H, N, d) in q's dtype.

    Under autocast q, k and v are cast to its dtype, as torch's attention does; float64 stays float64.

    Differentiable once in q, k, v and lse; the gradient of lse adds to those of q and k through `lookup_gather`.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes, M above N, or tensors on several devices.
        RuntimeError: the backend requested by name cannot run the call.
    """
    q, k, v = lookup_inputs(OP, q, k, v, q)
    _check_lse(q, lse)
    scale = default_scale(q) if scale is None else check_real(OP, "scale", scale)
    differentiated = is_differentiated(q, k, v, lse)
    backend = backends.choose(OP, q, head_dim=q.shape[-1], training=differentiated)
    if backend == "reference":
        return reference.lookup_scatter(q, k, v, lse, scale)
    if differentiated:
        shared = shared_inputs(lse, q, k, scale) if backend in SHARES_BACKWARD else None
        q, k = shared or (q, k)
        out = _LookupScatter.apply(*distinct(q, k, v), lse, scale, backend, shared is not None)
    else:
        out = _lookup_scatter(q, k, v, lse, scale, backend)
    return out.transpose(1, 2)


def _check_lse(q: Tensor, lse: Any) -> None:
    check_floating(OP, "lse", lse)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"tokred_kernels.{OP}: lse must be {tuple(q.shape[:3])} as q is {shape(q)}, got {shape(lse)}")
    accumulator = accumulator_of(q)
    if lse.dtype != accumulator:
        raise TypeError(f"tokred_kernels.{OP}: lse must be {accumulator} as q is {q.dtype}, got {lse.dtype}")
    check_same_device(OP, "lse", lse, "q", q)


class _LookupScatter(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, backend: str, shared: bool
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, lse)
        ctx.scale, ctx.backend, ctx.shared = scale, backend, shared
        return _lookup_scatter(q, k, v, lse, scale, backend)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse = ctx.saved_tensors
        arguments = grad_out, q, k, v, lse, ctx.scale
        needs = ctx.needs_input_grad[:4]
        with torch.no_grad():
            if ctx.shared:
                kernel = backends.implementation(ctx.backend, "lookup_scatter_backward")
                _, _, grad_v, grad_lse = kernel(*arguments, only_grad_v=True)
            else:
                *grads, grad_v, grad_lse = _lookup_scatter_backward(*arguments, ctx.backend)
        if ctx.shared:  # see `shared_inputs`
            grads_qk = [t if need else None for t, need in zip((v, grad_out.transpose(1, 2)), needs[:2], strict=True)]
        else:
            pairs = zip(map(heads_first, grads), needs[:2], strict=True)
            grads_qk = [forbid_double_backward(OP, g, grad_out) if need else None for g, need in pairs]
        pairs = zip((heads_first(grad_v), grad_lse), needs[2:], strict=True)
        rest = [forbid_double_backward(OP, g, grad_out) if need else None for g, need in pairs]
        return (*grads_qk, *rest, None, None, None)


def _fake(q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, backend: str) -> Tensor:
    return k.new_empty(heads_last(k))


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(heads_last(q)), k.new_empty(heads_last(k)), v.new_empty(heads_last(v)), torch.empty_like(lse)


_lookup_scatter = register(
    "lookup_scatter(Tensor q, Tensor k, Tensor v, Tensor lse, float scale, str backend) -> Tensor",
    _fake,
    {**LOOKUP_RULES, "v": "float (B, H, M, D)", "lse": "sums (B, H, M)"},
)
_lookup_scatter_backward = register(
    "lookup_scatter_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor lse, float scale, str backend) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_lse)",
    _backward_fake,
    {"grad_out": "float (B, N, H, D)", **LOOKUP_RULES, "v": "float (B, H, M, D)", "lse": "sums (B, H, M)"},
)
