# SPDX-License-Identifier: MIT
"""Functions that the ops' autograd Functions share."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from tokred_kernels.torch_state import in_functorch_transform


def constant(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` without its gradient. torch.jit.trace compares graphs made with and without gradients."""
    return tensor.detach() if tensor.requires_grad or torch.jit.is_tracing() else tensor


def is_differentiated(*tensors: torch.Tensor | None) -> bool:
    """Return whether an op must be called through its autograd.Function.

    That is so if it needs a gradient, and in forward-mode AD, where the Function raises; without it, the derivative
    would be zero.
    """
    if getattr(forward_ad, "_current_level", -1) >= 0:  # a private name, which a later torch can drop
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def distinct(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the tensors, with a view in place of each repetition while torch.compile traces.

    torch.compile does not accept an autograd.Function that takes the same tensor twice.
    """
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
        """Call torch's `apply`; raise NotImplementedError inside a transform of torch.func, such as grad or jvp."""
        if in_functorch_transform():
            raise NotImplementedError(
                "tokred_kernels: torch.func cannot differentiate the kernels; use "
                'tokred_kernels.use_backend("reference") around the call, or torch.autograd.grad for gradients'
            )
        return super().apply(*args)  # type: ignore[no-untyped-call]


class _ForbidDoubleBackward(torch.autograd.Function):
    """The identity on a first derivative; its own derivative raises."""

    @staticmethod
    def forward(ctx: Any, op: str, gradient: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"tokred_kernels.{ctx.op}: second derivatives are not supported by its kernels; "
            'use tokred_kernels.use_backend("reference") if you need them'
        )


def forbid_double_backward(op: str, gradient: torch.Tensor | None, anchor: torch.Tensor) -> torch.Tensor | None:
    """Return `gradient` such that differentiating it again, through `anchor`, raises a clear error."""
    if gradient is None or not torch.is_grad_enabled():
        return gradient
    return _ForbidDoubleBackward.apply(op, gradient, anchor)  # type: ignore[no-untyped-call]


def anchor_of(*tensors: torch.Tensor | None) -> torch.Tensor:
    """Return the anchor for `forbid_double_backward`: a tensor that requires a gradient, or the first if none does."""
    given = [tensor for tensor in tensors if tensor is not None]
    if not torch.is_grad_enabled():  # always so in torch.compile: torch 2.6 cannot trace the next line
        return given[0]
    return next((tensor for tensor in given if tensor.requires_grad), given[0])
