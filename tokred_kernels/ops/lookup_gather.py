# SPDX-License-Identifier: MIT
"""Lookup attention's gather: compressed tokens attend to lookup tokens; `lookup_scatter` reuses the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.layout import heads_last
from tokred_kernels.backends.reference import lookup_gather as reference
from tokred_kernels.backends.registration import register
from tokred_kernels.checks import check_floating, check_real, check_same_device, shape
from tokred_kernels.dtypes import accumulator_of, autocasted
from tokred_kernels.ops.autograd import Function, anchor_of, distinct, forbid_double_backward, is_differentiated
from tokred_kernels.torch_state import can_bypass_dispatcher, with_memory

OP = "lookup_gather"
# Backends whose gather backward can also compute a scatter's gradients of q and k; see `shared_inputs`.
SHARES_BACKWARD = ("cpu",)
_SHARED = "_tokred_shared"
LOOKUP_RULES = {
    "q": "float (B, H, M, D)",
    "k": "float (B, H, N, D)",
    "v": "float (B, H, N, D)",
    "scale": "1 <= M <= N",
    "backend": "D <= max_head_dim('lookup_gather', backend)",
}


def lookup_gather(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Return `A v` with A = softmax over N of q k^T scale: M compressed tokens gather from N lookup tokens.

    (LookupViT, section 3.2, algorithm 1.) A, (B, H, M, N), is never stored; `lookup_scatter` recomputes it.

    Args:
        q: (B, H, M, d), of the compressed tokens; M from 1 to N.
        k, v: (B, H, N, d), of the lookup tokens. A last stride of 1 avoids a copy.
        scale: the factor of q k^T; default 1 / sqrt(d).

    Returns:
        (B, H, M, d) in q's dtype, and the log-sum-exp of the scores, (B, H, M) float32 (float64 for float64). Scores
        and sums are kept in that dtype.

    Under autocast q, k and v are cast to its dtype, as torch's attention does; float64 stays float64.

    Differentiable once in q, k and v, through both results. O((M + N) d) memory for each image and head, forward and
    backward.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes, M above N, or tensors on several devices.
        RuntimeError: the backend requested by name cannot run the call.
    """
    q, k, v = lookup_inputs(OP, q, k, v, k)
    scale = default_scale(q) if scale is None else check_real(OP, "scale", scale)
    differentiated = is_differentiated(q, k, v)
    backend = backends.choose(OP, q, head_dim=q.shape[-1], training=differentiated)
    if backend == "reference":
        return reference.lookup_gather(q, k, v, scale)
    if differentiated:
        is_plain = can_bypass_dispatcher(q, k, v, but_the_profiler=True)
        shares = backend in SHARES_BACKWARD and is_plain and q.requires_grad and k.requires_grad
        out, lse, *shared = _LookupGather.apply(*distinct(q, k, v), scale, backend, shares)
        if shared:
            setattr(lse, _SHARED, (q, k, scale, *shared))
    else:
        out, lse = _lookup_gather(q, k, v, scale, backend)
    return out.transpose(1, 2), lse


def lookup_inputs(op: str, q: Any, k: Any, v: Any, v_like: Any) -> tuple[Tensor, ...]:
    """Return q (B, H, M, d), k (B, H, N, d) and v in autocast's dtype, if autocast is on.

    Raises unless v has the shape of `v_like`, all have one dtype and device, and M is from 1 to N.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_floating(op, name, value)
    q, k, v = autocasted(q, k, v)
    if q.dim() != 4:
        raise ValueError(f"tokred_kernels.{op}: q must be (B, H, M, d), got shape {shape(q)}")
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(f"tokred_kernels.{op}: k must be (B, H, N, d) as q is {shape(q)}, got {shape(k)}")
    if v.shape != v_like.shape:
        raise ValueError(f"tokred_kernels.{op}: v must be {shape(v_like)}, got {shape(v)}")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ValueError(
            f"tokred_kernels.{op}: q must have from 1 to N = {k.shape[2]} tokens, as many as k has, got {q.shape[2]}"
        )
    for name, value in (("k", k), ("v", v)):
        if value.dtype != q.dtype:
            raise TypeError(f"tokred_kernels.{op}: {name} must have q's dtype {q.dtype}, got {value.dtype}")
        check_same_device(op, name, value, "q", q)
    return q, k, v


def shared_inputs(lse: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """Return q and k as outputs of the gather that made `lse`, for the first scatter with the same inputs, else None.

    The backward of that scatter leaves the gradients of q and k to the gather's backward, which then computes the
    weights and the gradients of the scores once for both. It passes its v as the "gradient" of q, and the gradient of
    its result as the "gradient" of k: they have these shapes.
    """
    found = getattr(lse, _SHARED, None)
    if found is None or found[0] is not q or found[1] is not k or found[2] != scale:
        return None
    delattr(lse, _SHARED)
    return found[3:]


def default_scale(q: Tensor) -> float:
    """Return 1 / sqrt(d)."""
    return 1.0 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0


def heads_first(gradient: Tensor) -> Tensor:
    """Return (B, H, N, d) for a gradient (B, N, H, d), detached, so that autograd can accumulate into it in place."""
    return gradient.transpose(1, 2).detach()


class _LookupGather(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, shares: bool
    ) -> tuple[Tensor, ...]:
        out, lse = _lookup_gather(q, k, v, scale, backend)
        ctx.set_materialize_grads(False)  # without a scatter, lse has no gradient
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.backend = scale, backend
        return (out, lse, q.view_as(q), k.view_as(k)) if shares else (out, lse)

    @staticmethod
    def backward(
        ctx: Any,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        scatter_v: Tensor | None = None,
        scatter_grad: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        anchor = anchor_of(grad_out, grad_lse, scatter_v, scatter_grad)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        arguments = grad_out, grad_lse, q, k, v, out, lse, ctx.scale
        with torch.no_grad():
            if scatter_v is None:
                grads = _lookup_gather_backward(*arguments, ctx.backend)
            else:
                kernel = backends.implementation(ctx.backend, "lookup_gather_backward")
                grads = kernel(*with_memory(grad_out), *arguments[1:], scattered=with_memory(scatter_v, scatter_grad))
        needs = zip(map(heads_first, grads), ctx.needs_input_grad[:3], strict=True)
        return (*(forbid_double_backward(OP, g, anchor) if need else None for g, need in needs), None, None, None)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    accumulator = accumulator_of(q)
    return q.new_empty(heads_last(q)), q.new_empty(q.shape[:3], dtype=accumulator)


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(heads_last(q)), k.new_empty(heads_last(k)), v.new_empty(heads_last(v))


_lookup_gather = register(
    "lookup_gather(Tensor q, Tensor k, Tensor v, float scale, str backend) -> (Tensor out, Tensor lse)",
    _fake,
    LOOKUP_RULES,
)
_lookup_gather_backward = register(
    "lookup_gather_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "float scale, str backend) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    _backward_fake,
    {
        "grad_out": "float (B, M, H, D)",
        "grad_lse": "sums (B, H, M)",
        **LOOKUP_RULES,
        "out": "dense (B, M, H, D)",
        "lse": "sums (B, H, M)",
    },
)
