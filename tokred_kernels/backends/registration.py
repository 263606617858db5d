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
from tokred_kernels.torch_state import can_bypass_dispatcher, is_batched

LIBRARY = torch.library.Library("tokred", "DEF")
DEVICES = ("CPU", "CUDA")


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
    tensors = [place for place, kind in enumerate(kinds) if kind in ("Tensor", "Optional[Tensor]")]
    names = [argument.name for argument in overload._schema.arguments]
    index_places = [place for place in tensors if rules.get(names[place], "").startswith("int32")]
    values_of, indices_of = _getter([place for place in tensors if place not in index_places]), _getter(index_places)

    def call(*arguments: Any) -> Any:
        if is_compiling() or not can_bypass_dispatcher(*values_of(arguments), indices=indices_of(arguments)):
            return overload(*arguments)
        return direct(*arguments)

    # A gradient can be batched, and is one of the first two arguments. Ops on integers take no gradients.
    def call_floats(*arguments: Any) -> Any:
        if is_compiling() or not can_bypass_dispatcher(*values_of(arguments), indices=indices_of(arguments)):
            return overload(*arguments)
        first, second = arguments[:2]
        if is_batched(first) or (isinstance(second, torch.Tensor) and is_batched(second)):
            return overload(*arguments)
        return direct(*arguments)

    return call if SPECS[name].is_integer else call_floats


def _getter(places: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Return a function that returns the arguments at these places, as a tuple."""
    first = places[0] if places else 0
    if places == list(range(first, first + len(places))):
        return itemgetter(slice(first, first + len(places)))  # a slice is a tuple even of one argument
    return itemgetter(*places)


def _no_vmap(name: str) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"tokred_kernels: {name} has no torch.func.vmap rule; its first dimension is a batch already"
        )

    return fail
