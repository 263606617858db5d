# SPDX-License-Identifier: MIT
"""Registering ops with torch: one schema, one implementation that hands over to a backend, one fake kernel.

`Library.define` and `impl` cost far less a call than `torch.library.custom_op`, so they are used here, and even those
only if something intercepts calls (see `can_bypass_dispatcher`). Autograd is above the registered ops, in one
autograd.Function per op, whose cost is paid only when a gradient is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from tokred_kernels import backends
from tokred_kernels.ops.arguments import checker

LIBRARY = torch.library.Library("tokred", "DEF")
DEVICES = ("CPU", "CUDA")


# Private names of torch, so each may go missing; where one has, every call goes by the dispatcher.
_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transform_level: Any = getattr(getattr(torch._C, "_functorch", None), "maybe_current_level", None)
_profiler_runs: Any = getattr(torch.autograd, "_profiler_enabled", None)
# Of the tensors that torch.autograd.grad(is_grads_batched=True) runs a backward with.
_is_batched: Any = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None)
_is_tracing: Any = getattr(torch._C, "_is_tracing", None)
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
_CAN_SKIP = None not in (_dispatch_modes, _transform_level, _profiler_runs, _is_batched, _is_tracing)


def can_bypass_dispatcher(*tensors: Any, indices: tuple[Any, ...] = (), but_the_profiler: bool = False) -> bool:
    """Return whether an eager call on these tensors can skip the dispatcher, ignoring those that are None.

    `indices` are tensors of a TokenMap or Packing, which are never views that are negated lazily. With
    `but_the_profiler`, the profiler can miss the call.

    The dispatcher is needed by compilers, tensor subclasses, modes (flop counters, fake tensors), transforms and the
    profiler, and it gives memory to tensors that have none (negated views, zero tensors). Without them it only costs
    time, most of all in a model, whose kernels have driven its code out of the caches.
    """
    if not _CAN_SKIP or is_compiling():
        return False
    last = None
    for tensor in tensors:
        if tensor is None or tensor is last:
            continue
        if type(tensor) not in _PLAIN or tensor.is_neg() or tensor._is_zerotensor():
            return False
        last = tensor
    return (
        _PLAIN.issuperset(map(type, indices))
        and _dispatch_modes() == 0
        and _transform_level() is None
        and (but_the_profiler or not _profiler_runs())
        and not _is_tracing()
    )


def with_memory(*tensors: Any) -> tuple[torch.Tensor, ...]:
    """The tensors for a kernel that is called past the dispatcher: negated views and zero tensors written out."""
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            raise RuntimeError(
                f"tokred_kernels: this gradient needs plain tensors, got {type(tensor).__name__}; "
                'use tokred_kernels.use_backend("reference")'
            )
    return tuple(t.clone() if t._is_zerotensor() else t.resolve_neg() for t in tensors)


def register(
    schema: str,
    fake: Callable[..., Any],
    rules: Mapping[str, str],
    implementation: Callable[..., Any] | None = None,
    **packed: Any,
) -> Any:
    """Register `tokred::<schema>`, whose last argument names the backend, and return the function to call.

    Without an `implementation`, the backend's function of the op's name takes the other arguments as they are. `rules`
    and `packed` are those of `arguments.checker`: a call through the dispatcher is checked. The function returned skips
    both if it can: its callers have checked their arguments.
    """
    name = schema.partition("(")[0]

    def serve(*arguments: Any) -> Any:
        return backends.implementation(arguments[-1], name)(*arguments[:-1])

    direct = implementation or serve
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.tokred, name).default
    check = checker(overload._schema, rules, **packed)

    def checked(*arguments: Any) -> Any:
        return direct(*check(*arguments))

    def checked_fake(*arguments: Any) -> Any:
        devices = {argument.device for argument in arguments if isinstance(argument, torch.Tensor)}
        if len(devices) > 1:  # the dispatcher prefers "meta", and would return a result without values
            given = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"tokred_kernels.{name}: all tensors must be on one device, got {given}")
        return fake(*arguments)

    for device in DEVICES:
        LIBRARY.impl(name, checked, device)
    torch.library.register_fake(f"tokred::{name}", checked_fake, lib=LIBRARY)
    torch.library.register_vmap(f"tokred::{name}", _no_vmap(name), lib=LIBRARY)
    kinds = [str(argument.type) for argument in overload._schema.arguments]
    tensors = [place for place, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]
    names = [argument.name for argument in overload._schema.arguments]
    index_places = [place for place in tensors if rules.get(names[place], "").startswith("int32")]
    values_of, indices_of = _getter([place for place in tensors if place not in index_places]), _getter(index_places)

    def call(*arguments: Any) -> Any:
        if is_compiling() or not can_bypass_dispatcher(*values_of(arguments), indices=indices_of(arguments)):
            return overload(*arguments)
        return direct(*arguments)

    # Gradients may come in batches, and either of two may; ops of whole numbers get none, and need not ask.
    def call_floats(*arguments: Any) -> Any:
        if is_compiling() or not can_bypass_dispatcher(*values_of(arguments), indices=indices_of(arguments)):
            return overload(*arguments)
        first, second = arguments[:2]
        if _is_batched(first) or (isinstance(second, torch.Tensor) and _is_batched(second)):
            return overload(*arguments)
        return direct(*arguments)

    return call if name in backends.MAP_OPS else call_floats


def _getter(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return a function that returns the arguments at these places."""
    if places == list(range(len(places))):
        return itemgetter(slice(len(places)))
    if places == list(range(places[0], places[-1] + 1)):
        return itemgetter(slice(places[0], places[-1] + 1))
    return itemgetter(*places)


def _no_vmap(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"tokred_kernels: {name} has no torch.func.vmap rule; its first dimension is a batch already"
        )

    return refuse


def constant(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` without its gradient. torch.jit.trace compares graphs made with and without gradients."""
    return tensor.detach() if tensor.requires_grad or torch.jit.is_tracing() else tensor


def is_differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether an op must go by its autograd.Function: for its gradient, or to refuse forward-mode derivatives.

    Those an op that is called past autograd would take for zero, in silence.
    """
    if getattr(forward_ad, "_current_level", -1) >= 0:  # a private name, that may go missing
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def distinct(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """These tensors, for an autograd.Function: while torch.compile traces, which refuses one twice, a view instead."""
    if not is_compiling():
        return tensors
    return tuple(
        tensor.view_as(tensor) if any(tensor is before for before in tensors[:place]) else tensor
        for place, tensor in enumerate(tensors)
    )


class Function(torch.autograd.Function):
    """Base class of the ops' differentiable calls of kernels."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Raise NotImplementedError inside a transform of torch.func, such as grad or jvp, else call torch's."""
        if _transform_level is not None and _transform_level() is not None:
            raise NotImplementedError(
                "tokred_kernels: torch.func cannot differentiate the kernels; use "
                'tokred_kernels.use_backend("reference") around the call, or torch.autograd.grad for gradients'
            )
        return super().apply(*args)


class _Once(torch.autograd.Function):
    """The identity, whose derivative is an error: what a first derivative passes through on its way out."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"tokred_kernels.{ctx.op}: second derivatives are not supported by its kernels; "
            'use tokred_kernels.use_backend("reference") where you need them'
        )


def forbid_double_backward(op: str, gradient: torch.Tensor | None, anchor: torch.Tensor) -> torch.Tensor | None:
    """`gradient`, made to raise a clear error if it is differentiated again (by way of `anchor`, the one that came)."""
    if gradient is None or not torch.is_grad_enabled():
        return gradient
    return _Once.apply(op, gradient, anchor)


def anchor_of(*tensors: torch.Tensor | None) -> torch.Tensor:
    """That of these by way of which a gradient may be differentiated again, for `once`; any where none may be."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not torch.is_grad_enabled():  # torch.compile always: torch 2.6 does not let it look any further
        return given[0]
    return next((tensor for tensor in given if tensor.requires_grad), given[0])
