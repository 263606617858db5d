# SPDX-License-Identifier: MIT
"""Unmerge: a gather along a token map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.reference import unmerge as reference
from tokred_kernels.backends.registration import register
from tokred_kernels.checks import check_same_device, check_tokens, shape
from tokred_kernels.ops.autograd import Function, forbid_double_backward, is_differentiated
from tokred_kernels.ops.merge import _merge, check_map
from tokred_kernels.token_map import TokenMap


def unmerge(y: Tensor, token_map: TokenMap) -> Tensor:
    """Give every token the value of its slot: N tokens in their original order (ToMe, appendix D; ALGM, section 3.4).

    Args:
        y: (B, N', C), or (T', C) for a packed map, one row for each slot.
        token_map: from N tokens to N' slots. A map composed by `then` undoes the merges of several layers at once.

    Returns:
        (B, N, C), or (T, C) if the map takes packed tokens, in y's dtype; 0 for dropped tokens.

    Differentiable once in `y`: the gradient is the sum over each slot's members.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: `y` does not have the map's slots, or is on another device.
        RuntimeError: the backend requested by name cannot run the call.
    """
    check_map("unmerge", token_map)
    check_tokens("unmerge", "y", y, packed=token_map.packed is not None)
    if y.shape[:-1] != token_map.out_shape:
        raise ValueError(
            f"tokred_kernels.unmerge: token_map must be made for y's slots: y is {shape(y)}, "
            f"the map gives {(*token_map.out_shape, 'C')}"
        )
    check_same_device("unmerge", "token_map", token_map.dest, "y", y)
    if token_map.packed is not None:
        return unmerge(y[None], token_map.as_rows()).view(*token_map.in_shape, y.shape[-1])
    differentiated = is_differentiated(y)
    backend = backends.choose("unmerge", y, training=differentiated)
    if backend == "reference":
        return reference.unmerge(y, token_map.dest)
    if differentiated:
        return _Unmerge.apply(y, token_map.dest, *token_map.views(), backend)
    return _unmerge(y, token_map.dest, backend)


class _Unmerge(Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, dest: Tensor, members: Tensor, begin: Tensor, count: Tensor, backend: str
    ) -> Tensor:
        ctx.save_for_backward(members, begin, count)
        ctx.backend = backend
        return _unmerge(y, dest, backend)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grad_y, _ = _merge(grad_x, None, *ctx.saved_tensors, "sum", False, ctx.backend)
        return forbid_double_backward("unmerge", grad_y, grad_x), None, None, None, None, None


def _fake(y: Tensor, dest: Tensor, backend: str) -> Tensor:
    return y.new_empty((*dest.shape, y.shape[2]))


_unmerge = register(
    "unmerge(Tensor y, Tensor dest, str backend) -> Tensor",
    _fake,
    {"y": "float (B, M, C)", "dest": "int32 (B, N); entries(dest, -1, M)"},
)
