# SPDX-License-Identifier: MIT
"""Attention over tokens with sizes and a keep policy, which can return the importance of each token."""

from __future__ import annotations

import math
from typing import Any, overload

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.layout import attention_layout
from tokred_kernels.backends.reference import token_attention as reference
from tokred_kernels.backends.registration import register
from tokred_kernels.backends.torch_attention import torchs_attention
from tokred_kernels.checks import check_choice, check_floating, check_real, check_same_device, is_per_row, shape
from tokred_kernels.dtypes import accumulator_of, autocasted
from tokred_kernels.ops.autograd import Function, anchor_of, distinct, forbid_double_backward, is_differentiated
from tokred_kernels.packing import Packing, check_packing
from tokred_kernels.torch_state import can_bypass_dispatcher

OP = "token_attention"
IMPORTANCES = ("class", "mean", "last")
IMPORTANCE_RULE = "importance in ('', 'class', 'mean', 'last')"
ATTENTION_RULES = {
    **dict.fromkeys(("q", "k", "v"), "float (B, H, N, D)"),
    **dict.fromkeys(("bias", "policy"), "sums (B, N)"),
    "longest": "longest >= 0",
    "importance": IMPORTANCE_RULE,
    "backend": "D <= max_head_dim('token_attention', backend)",
}
PACKED_RULES = {
    **dict.fromkeys(("q", "k", "v"), "float (T, H, D)"),
    **dict.fromkeys(("bias", "policy"), "sums (T,)"),
    "starts": "int32 (S,); starts_of(starts, T, longest)",
    "longest": "0 <= longest <= T or S == 1",
}


@overload
def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: Tensor | None = None,
    policy: Tensor | None = None,
    scale: float | None = None,
    importance: None = None,
    packed: Packing | None = None,
) -> Tensor: ...


@overload
def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: Tensor | None = None,
    policy: Tensor | None = None,
    scale: float | None = None,
    importance: str,
    packed: Packing | None = None,
) -> tuple[Tensor, Tensor]: ...


def token_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: Tensor | None = None,
    policy: Tensor | None = None,
    scale: float | None = None,
    importance: str | None = None,
    packed: Packing | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return `softmax(q k^T scale + log size) v` and the importance of each token, without storing N x N weights.

    Args:
        q, k, v: (B, H, N, d), or (T, H, d) if `packed`, of one dtype. A last stride of 1 avoids a copy.
        size: (B, N) or (B, N, 1), how many original tokens each key represents (ToMe, section 3.2); above 0.
        policy: (B, N) or (B, N, 1), from 0 (dropped) to 1 (kept) (DynamicViT, section 3.3). With e_ij =
            exp(s_ij - max_j s_ij), and m_ij = policy_j except m_ii = 1, the weights are (e m + eps / N) /
            (sum e m + eps), eps = 1e-6. A query always attends to itself, so a policy of zeros gives finite results.
        scale: the factor of q k^T; default 1 / sqrt(d).
        importance: None, or the attention weights that make the importance of a key, averaged over heads: "class", the
            weights of the first query (EViT, DiffRate); "mean", their mean over queries; "last", the weights of the
            last query.
        packed: the starts of the images in packed rows, such as `token_map.packed`. Then size and policy are (T,) or
            (T, 1), and each image has its own first and last query.

    Returns:
        (B, H, N, d), or (T, H, d), in q's dtype. With `importance`, a pair of this and the importance: (B, N), or (T,),
        float32 (float64 for float64).

    Under autocast q, k and v are cast to its dtype, as torch's attention does; float64 stays float64.

    Differentiable once in q, k, v, size and policy, through both results. Scores and sums are kept in float32.
    O(B H N d) memory, forward and backward. Calls without policy, importance and packed run torch's own
    scaled_dot_product_attention if it is the fastest: always without a size, and for CPUs with a size, except in
    bfloat16 with AMX, and in float32 with AVX-512 from some hundred tokens on.

    NaN in q, k or v gives NaN, except that in torch's own attention on a CPU a query with a NaN can give 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes, a scale that is not finite, an unknown `importance`, tensors on several devices, sizes
            that are not above 0, or a policy outside [0, 1]. The entries are checked on the CPU only; on a GPU this
            would wait for the device.
        RuntimeError: the backend requested by name cannot run the call.
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_floating(OP, name, value)
    q, k, v = autocasted(q, k, v)
    if packed is not None:
        packed = check_packing(OP, packed)
    rows = _check(q, k, v, packed)
    if importance is not None:
        check_choice(OP, "importance", importance, IMPORTANCES)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    scale = check_real(OP, "scale", scale)
    size, policy = _per_token("size", size, q, rows), _per_token("policy", policy, q, rows)
    if size is not None:
        low, _ = _bounds(size)
        if low <= 0:
            raise ValueError(f"tokred_kernels.{OP}: size must be above 0, got {low:g}")
    if policy is not None:
        low, high = _bounds(policy)
        if low < 0 or high > 1:
            raise ValueError(f"tokred_kernels.{OP}: policy must be from 0 to 1, got values from {low:g} to {high:g}")
    bias = None if size is None else size.log()
    # Some releases of torch (2.11 is one) divide by the number of heads: with 0 heads the process dies.
    if policy is None and importance is None and packed is None and q.shape[1] > 0:
        needs_grad_bias = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        eager = q.is_cpu and can_bypass_dispatcher(q, but_the_profiler=True)
        training = is_differentiated(q, k, v)
        if not needs_grad_bias and backends.use_sdpa(
            OP, q, plain=bias is None, eager=eager, head_dim=q.shape[-1], training=training
        ):
            return torchs_attention(q, k, v, bias, scale=scale)
    training = is_differentiated(q, k, v, bias, policy)
    backend = backends.choose(OP, q, head_dim=q.shape[-1], training=training)
    out, importance_out = _attend(q, k, v, bias, policy, packed, scale, importance or "", backend)
    return out if importance is None else (out, importance_out)


def _check(q: Any, k: Any, v: Any, packed: Packing | None) -> tuple[int, ...]:
    """Raise unless q, k and v fit together; return the shape of a tensor with one entry for each token."""
    wanted, rank = ("(B, H, N, d)", 4) if packed is None else ("(T, H, d), packed", 3)
    if q.dim() != rank:
        raise ValueError(f"tokred_kernels.{OP}: q must be {wanted}, got shape {shape(q)}")
    for name, value in (("k", k), ("v", v)):
        if value.shape != q.shape:
            raise ValueError(f"tokred_kernels.{OP}: {name} must have q's shape {shape(q)}, got {shape(value)}")
        if value.dtype != q.dtype:
            raise TypeError(f"tokred_kernels.{OP}: {name} must have q's dtype {q.dtype}, got {value.dtype}")
        check_same_device(OP, name, value, "q", q)
    if packed is None:
        return q.shape[0], q.shape[2]
    if packed.rows != q.shape[0]:
        raise ValueError(f"tokred_kernels.{OP}: q must have the {packed.rows} rows of packed, got shape {shape(q)}")
    check_same_device(OP, "packed", packed.cu_seqlens, "q", q)
    return (q.shape[0],)


def _per_token(name: str, value: Any, q: Tensor, rows: tuple[int, ...]) -> Tensor | None:
    """Return `value` as a contiguous tensor of shape `rows` in the dtype of sums; differentiable."""
    if value is None:
        return None
    check_floating(OP, name, value)
    if not is_per_row(value, rows):
        raise ValueError(f"tokred_kernels.{OP}: {name} must be {rows} or {(*rows, 1)}, got {shape(value)}")
    check_same_device(OP, name, value, "q", q)
    accumulator = accumulator_of(q)
    return value.to(accumulator).reshape(rows).contiguous()


def _bounds(value: Tensor) -> tuple[float, float]:
    """Return the lowest and highest entry of `value`, ignoring NaN; 1 and 1 if its entries cannot be read for free."""
    if value.device.type != "cpu" or value.numel() == 0 or not can_bypass_dispatcher(value):
        return 1.0, 1.0
    numbers = value.detach().nan_to_num(nan=1.0)
    low, high = numbers.aminmax()
    return low.item(), high.item()


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    policy: Tensor | None,
    packed: Packing | None,
    scale: float,
    importance: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference.token_attention(q, k, v, bias, policy, packed, scale, importance)
    starts = None if packed is None else packed.cu_seqlens
    longest = 0 if packed is None else max(packed.lengths, default=0)
    if is_differentiated(q, k, v, bias, policy):
        out, importance_out = _TokenAttention.apply(
            *distinct(q, k, v), bias, policy, starts, longest, scale, importance, backend
        )
    else:
        out, _, _, importance_out = _token_attention(q, k, v, bias, policy, starts, longest, scale, importance, backend)
    return (out if packed is not None else out.transpose(1, 2)), importance_out


class _TokenAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        policy: Tensor | None,
        starts: Tensor | None,
        longest: int,
        scale: float,
        importance: str,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        out, row_max, row_sum, importance_out = _token_attention(
            q, k, v, bias, policy, starts, longest, scale, importance, backend
        )
        ctx.set_materialize_grads(False)  # an importance that only selects tokens has no gradient
        ctx.save_for_backward(q, k, v, bias, policy, starts, out, row_max, row_sum)
        ctx.settings = longest, scale, importance
        ctx.backend = backend
        if not importance:
            ctx.mark_non_differentiable(importance_out)
        return out, importance_out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_importance: Tensor | None) -> tuple[Tensor | None, ...]:
        longest, scale, importance = ctx.settings
        q, k, v, bias, policy, starts, out, row_max, row_sum = ctx.saved_tensors
        needs = ctx.needs_input_grad
        need_bias, need_policy = bias is not None and needs[3], policy is not None and needs[4]
        # Attention is nonlinear in all inputs but v, so a second derivative can go through any of them.
        anchor = anchor_of(grad_out, grad_importance, q, k, v, bias, policy)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        with torch.no_grad():
            grads = _token_attention_backward(
                *(
                    grad_out,
                    grad_importance if importance else None,
                    q,
                    k,
                    v,
                    bias,
                    policy,
                    starts,
                    out,
                    row_max,
                    row_sum,
                ),
                *(longest, scale, importance, need_bias, need_policy, ctx.backend),
            )
        if starts is None:
            grads = (*(g.transpose(1, 2) for g in grads[:3]), *grads[3:])
        wanted = (*needs[:3], need_bias, need_policy)
        return (
            *(forbid_double_backward(OP, g, anchor) if w else None for g, w in zip(grads, wanted, strict=True)),
            *(None,) * 5,
        )


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    policy: Tensor | None,
    starts: Tensor | None,
    longest: int,
    scale: float,
    importance: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = attention_layout(q, starts)
    accumulator = accumulator_of(q)
    row = q.new_empty(layout[:-1], dtype=accumulator)
    importance_out = q.new_empty(layout[:-2] if importance else (0,), dtype=accumulator)
    return q.new_empty(layout), row, torch.empty_like(row), importance_out


def _backward_fake(
    grad_out: Tensor,
    grad_importance: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    policy: Tensor | None,
    starts: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    longest: int,
    scale: float,
    importance: str,
    need_bias: bool,
    need_policy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = row_max.shape[:-1]
    return (
        torch.empty_like(out),
        torch.empty_like(out),
        torch.empty_like(out),
        row_max.new_empty(rows if need_bias else (0,)),
        row_max.new_empty(rows if need_policy else (0,)),
    )


_token_attention = register(
    "token_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? policy, Tensor? starts, SymInt longest, "
    "float scale, str importance, str backend) -> (Tensor out, Tensor row_max, Tensor row_sum, Tensor importance)",
    _fake,
    ATTENTION_RULES,
    packed=PACKED_RULES,
    by="starts",
)
_token_attention_backward = register(
    "token_attention_backward(Tensor grad_out, Tensor? grad_importance, Tensor q, Tensor k, Tensor v, Tensor? bias, "
    "Tensor? policy, Tensor? starts, Tensor out, Tensor row_max, Tensor row_sum, SymInt longest, float scale, "
    "str importance, bool need_bias, bool need_policy, str backend) "
    "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_policy)",
    _backward_fake,
    {
        "grad_out": "float (B, N, H, D)",
        "grad_importance": "sums (B, N)",
        **ATTENTION_RULES,
        "out": "dense (B, N, H, D)",
        **dict.fromkeys(("row_max", "row_sum"), "sums (B, N, H)"),
        "importance": IMPORTANCE_RULE + " and (importance != '' or grad_importance is None)",
        "need_bias": "not need_bias or bias is not None",
        "need_policy": "not need_policy or policy is not None",
    },
    packed={
        "grad_out": "float (T, H, D)",
        "grad_importance": "sums (T,)",
        **PACKED_RULES,
        "out": "dense (T, H, D)",
        **dict.fromkeys(("row_max", "row_sum"), "sums (T, H)"),
    },
    by="starts",
)
