# SPDX-License-Identifier: MIT
"""Registering ops with torch: one schema, one implementation that hands over to a backend, one fake kernel.

`Library.define` and `impl` cost some 2.5 us a call where `torch.library.custom_op` costs tens, so they are used here.
Autograd stands above the registered ops, in one autograd.Function an op (its own 16 us are paid only when a gradient
is asked for).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tokred_kernels import backends

LIBRARY = torch.library.Library("tokred", "DEF")
DEVICES = ("CPU", "CUDA")


def register(schema: str, fake: Callable[..., Any], implementation: Callable[..., Any] | None = None) -> Any:
    """Register `tokred::<schema>`, whose last argument names the backend, and return its overload, ready to be called.

    Without an `implementation`, the backend's function of the op's name takes the other arguments as they are.
    """
    name = schema.partition("(")[0]
    if implementation is None:
        implementation = _by_backend(name)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in DEVICES:
        LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"tokred::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"tokred::{name}", _no_vmap(name), lib=LIBRARY)
    return getattr(torch.ops.tokred, name).default


def _by_backend(name: str) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        return backends.implementation(arguments[-1], name)(*arguments[:-1])

    return run


def _no_vmap(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"tokred_kernels: {name} has no torch.func.vmap rule; its first dimension is a batch already"
        )

    return refuse


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


def once(op: str, gradient: torch.Tensor | None, anchor: torch.Tensor) -> torch.Tensor | None:
    """`gradient`, made to raise a clear error if it is differentiated again (by way of `anchor`, the one that came)."""
    if gradient is None or not torch.is_grad_enabled():
        return gradient
    return _Once.apply(op, gradient, anchor)
