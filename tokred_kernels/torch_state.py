# SPDX-License-Identifier: MIT
"""What torch is doing during a call: whether a compiler, a mode, a transform or the profiler intercepts ops."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_compiling

# Private names, which a later torch can drop. If one is missing, every call goes through the dispatcher.
_dispatch_modes: Any = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transform_level: Any = getattr(getattr(torch._C, "_functorch", None), "maybe_current_level", None)
_profiler_runs: Any = getattr(torch.autograd, "_profiler_enabled", None)
# True for the gradients in torch.autograd.grad(is_grads_batched=True).
is_batched: Any = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None)
_is_tracing: Any = getattr(torch._C, "_is_tracing", None)
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
_CAN_SKIP = None not in (_dispatch_modes, _transform_level, _profiler_runs, is_batched, _is_tracing)


def can_bypass_dispatcher(*tensors: Any, indices: tuple[Any, ...] = (), but_the_profiler: bool = False) -> bool:
    """Return whether an eager call on these tensors can skip the dispatcher, ignoring those that are None.

    `indices` are tensors of a TokenMap or Packing, which are never lazily negated views. With `but_the_profiler`, the
    profiler can miss the call.

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
        _PLAIN.issuperset(map(type, indices))
        and _dispatch_modes() == 0
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
