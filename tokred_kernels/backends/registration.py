# SPDX-License-Identifier: MIT
"""Register ops with torch: one schema, one implementation that calls a backend, one fake kernel.

A call of an op defined with `Library.define` and `impl` takes 2.5 us, one of `torch.library.custom_op` 96 us. Eager
calls skip even the former unless something intercepts calls (see `can_bypass_dispatcher`). The ops use an
autograd.Function, which takes 16 us, only if a gradient is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch.compiler import is_compiling

from tokred_kernels import backends
from tokred_kernels.backends.arguments import checker
from tokred_kernels.ops.registry import SPECS

LIBRARY = torch.library.Library("tokred", "DEF")
DEVICES = ("CPU", "CUDA")

# Private names, which a later torch can drop. If one is missing, every call goes through the dispatcher.
_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transform_level: Any = getattr(getattr(torch._C, "_functorch", None), "maybe_current_level", None)
_profiler_runs: Any = getattr(torch.autograd, "_profiler_enabled", None)
# True for the gradients in torch.autograd.grad(is_grads_batched=True).
_is_batched: Any = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None)
_is_tracing: Any = getattr(torch._C, "_is_tracing", None)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_CAN_SKIP = None not in (_dispatch_modes, _transform_level, _profiler_runs, _is_batched, _is_tracing)


def can_bypass_dispatcher(*tensors: Any, but_the_profiler: bool = False) -> bool:
    """Return whether an eager call on these tensors can skip the dispatcher, ignoring those that are None.

    With `but_the_profiler`, the profiler can miss the call.

    The dispatcher is needed by compilers, tensor subclasses, modes (flop counters, fake tensors), transforms and the
    profiler, and it gives memory to tensors that have none (negated views, zero tensors). Otherwise it only costs time.
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
        _dispatch_modes() == 0
        and _transform_level() is None
        and (but_the_profiler or not _profiler_runs())
        and not _is_tracing()
    )


def in_functorch_transform() -> bool:
    """Return whether the call is inside a transform of torch.func."""
    return _transform_level is not None and _transform_level() is not None


def with_memory(*tensors: Any) -> tuple[torch.Tensor, ...]:
    """Return the tensors for a kernel that bypasses the dispatcher: negated views and zero tensors are copied."""
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

    The default `implementation` calls the backend's function of the same name with the other arguments. A call through
    the dispatcher checks its arguments by `rules` and `packed`, as `arguments.checker` does. The function returned
    bypasses the dispatcher and this check if it can: its callers have checked their arguments.
    """
    name = schema.partition("(")[0]

    def call_backend(*arguments: Any) -> Any:
        return backends.implementation(arguments[-1], name)(*arguments[:-1])

    direct = implementation or call_backend
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
    places = [place for place, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]
    leading = places == list(range(len(places)))
    tensors_of: Any = itemgetter(slice(len(places)) if leading else places[0], *([] if leading else places[1:]))

    def call(*arguments: Any) -> Any:
        if is_compiling() or not can_bypass_dispatcher(*tensors_of(arguments)):
            return overload(*arguments)
        return direct(*arguments)

    # A gradient can be batched, and is one of the first two arguments. Ops on integers take no gradients.
    def call_floats(*arguments: Any) -> Any:
        if is_compiling() or not can_bypass_dispatcher(*tensors_of(arguments)):
            return overload(*arguments)
        first, second = arguments[:2]
        if _is_batched(first) or (isinstance(second, torch.Tensor) and _is_batched(second)):
            return overload(*arguments)
        return direct(*arguments)

    return call if SPECS[name].is_integer else call_floats


def _no_vmap(name: str) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"tokred_kernels: {name} has no torch.func.vmap rule; its first dimension is a batch already"
        )

    return fail
