# SPDX-License-Identifier: MIT
"""A few compressed tokens look up many: cross attention whose weights `lookup_scatter` uses again."""

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
# Whose kernel takes over what a scatter by the same weights gives q and k, and what an lse carries so that it does.
TAKES_OVER = ("cpu",)
_CARRIED = "_tokred_carried"
LOOKUP_RULES = {
    "q": "float (B, H, M, D)",
    "k": "float (B, H, N, D)",
    "v": "float (B, H, N, D)",
    "scale": "1 <= M <= N",
    "backend": "D <= max_head_dim('lookup_gather', backend)",
}


def lookup_gather(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """`A v` with A = softmax over N of q k^T scale: what M compressed tokens gather from N lookup tokens.

    (LookupViT, section 3.2, algorithm 1.) A, (B, H, M, N), is never stored; `lookup_scatter` makes it anew.

    Args:
        q: (B, H, M, d), of the compressed tokens; M from 1 to N.
        k, v: (B, H, N, d), of the lookup tokens; any strides whose last is 1.
        scale: of the scores; default 1 / sqrt(d).

    Returns:
        (B, H, M, d) in q's dtype, and the logarithm of the sums of exponentials, (B, H, M) float32 (float64 for
        float64). Scores and sums are kept in that.

    Under autocast q, k and v are taken in its dtype, as torch's attention takes them; float64 stays.

    Differentiable once in q, k and v, by way of both. O((M + N) d) memory for an image and head, forward and backward.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes, M above N, or tensors on several devices.
        RuntimeError: the backend asked for cannot serve the call.
    """
    q, k, v = lookup_inputs(OP, q, k, v, k)
    scale = default_scale(q) if scale is None else check_real(OP, "scale", scale)
    differentiated = is_differentiated(q, k, v)
    backend = backends.choose(OP, q, head_dim=q.shape[-1], training=differentiated)
    if backend == "reference":
        return reference.lookup_gather(q, k, v, scale)
    if differentiated:
        alone = can_bypass_dispatcher(q, k, v, but_the_profiler=True)
        carries = backend in TAKES_OVER and alone and q.requires_grad and k.requires_grad
        out, lse, *carried = _LookupGather.apply(*distinct(q, k, v), scale, backend, carries)
        if carried:
            setattr(lse, _CARRIED, (q, k, scale, *carried))
    else:
        out, lse = _lookup_gather(q, k, v, scale, backend)
    return out.transpose(1, 2), lse


def lookup_inputs(op: str, q: Any, k: Any, v: Any, of_v: Any) -> tuple[Tensor, ...]:
    """q (B, H, M, d), k (B, H, N, d) and v as `of_v`, in autocast's dtype where that is on.

    Raises unless they are that, of one dtype and device, M from 1 to N.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_floating(op, name, value)
    q, k, v = autocasted(q, k, v)
    if q.dim() != 4:
        raise ValueError(f"tokred_kernels.{op}: q must be (B, H, M, d), got shape {shape(q)}")
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(f"tokred_kernels.{op}: k must be (B, H, N, d) as q is {shape(q)}, got {shape(k)}")
    if v.shape != of_v.shape:
        raise ValueError(f"tokred_kernels.{op}: v must be {shape(of_v)}, got {shape(v)}")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ValueError(
            f"tokred_kernels.{op}: q must have from 1 to N = {k.shape[2]} tokens, as many as k has, got {q.shape[2]}"
        )
    for name, value in (("k", k), ("v", v)):
        if value.dtype != q.dtype:
            raise TypeError(f"tokred_kernels.{op}: {name} must have q's dtype {q.dtype}, got {value.dtype}")
        check_same_device(op, name, value, "q", q)
    return q, k, v


def carried(lse: Tensor, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """q and k by way of the gather of these that made `lse`: for one scatter, None for all others.

    That scatter leaves their gradients to the gather. It hands over its v as the gradient of q and that of its result
    as the gradient of k, whose shapes these have; and the gather makes the weights, and the gradients of the scores,
    once for both.
    """
    found = getattr(lse, _CARRIED, None)
    if found is None or found[0] is not q or found[1] is not k or found[2] != scale:
        return None
    delattr(lse, _CARRIED)
    return found[3:]


def default_scale(q: Tensor) -> float:
    """1 / sqrt(d)."""
    return 1.0 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0


def heads_first(gradient: Tensor) -> Tensor:
    """(B, H, N, d) for a gradient (B, N, H, d); detached, so that autograd adds another one in place, not beside it."""
    return gradient.transpose(1, 2).detach()


class _LookupGather(Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, carries: bool
    ) -> tuple[Tensor, ...]:
        out, lse = _lookup_gather(q, k, v, scale, backend)
        ctx.set_materialize_grads(False)  # where nothing is scattered, none comes through lse
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.backend = scale, backend
        return (out, lse, q.view_as(q), k.view_as(k)) if carries else (out, lse)

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
