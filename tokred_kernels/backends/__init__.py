# SPDX-License-Identifier: MIT
"""Choose the backend for each call: the one requested by name, or the fastest that passed the self-check."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from tokred_kernels.backends import native, selfcheck
from tokred_kernels.backends.selection import ranking
from tokred_kernels.backends.support import BACKENDS, can_run, implementation
from tokred_kernels.backends.triton.availability import triton_interprets
from tokred_kernels.checks import shown
from tokred_kernels.ops.registry import OPS, SPECS

__all__ = [
    "AUTO",
    "BACKENDS",
    "OPS",
    "best",
    "can_run",
    "choose",
    "companion",
    "implementation",
    "prepare",
    "requested",
    "triton_interprets",
    "use_backend",
    "use_sdpa",
]

AUTO = "auto"
# Devices whose kernels run under `auto` only after the self-check. The C++ kernels are tested before each release.
SELF_CHECKED = frozenset(("cuda",))

# Token counts above which our CPU kernel beats SDPA with a bias, in float32 with vectors of 64 bytes. SDPA is at its
# best if TORCHS_BLOCK divides the count, which is rare after merging; for other counts ours is faster from RAGGED on,
# or from RAGGED_IF_NARROW on in heads of fewer than WIDE_HEADS channels. The CPU benchmarks time the smallest.
LONG, RAGGED, RAGGED_IF_NARROW = 160, 97, 129
WIDE_HEADS, TORCHS_BLOCK = 64, 16


def _valid(source: str, name: str) -> str:
    if not isinstance(name, str) or name not in (AUTO, *BACKENDS):
        raise ValueError(f"{source} must be one of {', '.join((AUTO, *BACKENDS))}, got {shown(name)}")
    return name


_requested = os.environ.get("TOKRED_BACKEND", AUTO)  # checked at first use: an error here would make every import fail
_chosen: dict[tuple[Any, ...], str] = {}


def requested() -> str:
    """Return the backend that was requested, or "auto".

    Raises:
        ValueError: the environment variable TOKRED_BACKEND is none of them.
    """
    return _valid("TOKRED_BACKEND", _requested)


class use_backend:
    """Choose the backend for every op: permanently, or for a `with` block.

    Args:
        name: "reference", "cpu", "cuda", "triton", or "auto", the default: on a CPU the C++ kernels, on a GPU the
            fastest kernels that have passed the self-check there, and otherwise the reference. The environment variable
            TOKRED_BACKEND sets another default.

    A backend requested by name that cannot run a call makes that call raise RuntimeError with the reason and the
    backends that can. The choice holds for the process, not for the thread.
    """

    def __init__(self, name: str) -> None:
        global _requested
        name = _valid("tokred_kernels.use_backend: name", name)
        self._before, _requested = _requested, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *_: object) -> None:
        global _requested  # noqa: PLW0603
        _requested = self._before


def choose(op: str, tensor: Tensor, *, head_dim: int = 0, training: bool = False) -> str:
    """Return the backend that runs `op` on this tensor: the one requested, or the best.

    Args:
        op: a registered op.
        tensor: its first input.
        head_dim: the head dimension, for attention.
        training: if True, the gradient's kernel must have passed the self-check as well.

    Raises:
        RuntimeError: the backend requested cannot run the call; the message has the reason and the backends that can.
        ValueError: TOKRED_BACKEND names no backend.
    """
    is_direct = tensor.is_cpu and _requested in (AUTO, "cpu") and native.MODULE is not None
    if is_direct and "cpu" not in SELF_CHECKED and not torch.jit.is_tracing():
        return "cpu"  # the result of `_choose`, found faster: this runs between two layers of a model
    return _choose(op, _requested, tensor, head_dim, training)


def prepare(module: torch.nn.Module) -> None:
    """Run the self-check now for each GPU that holds parameters of `module`, if it is due and `auto` will need it.

    So it does not run in the middle of a forward pass, of tracing, or of graph capture.
    """
    if _requested == AUTO:
        for device in {p.device for p in module.parameters() if p.device.type in SELF_CHECKED}:
            selfcheck.verdicts(device)


def best(op: str, tensor: Tensor) -> str:
    """Return the backend that runs `op`, an op on integers: the one requested if it can, else the best."""
    if tensor.is_cpu and _requested in (AUTO, "cpu") and native.MODULE is not None and not torch.jit.is_tracing():
        return "cpu"  # a shortcut with the same result as `_choose`: this runs between two layers of a model
    if _requested != AUTO and can_run(op, requested(), tensor.device, tensor.dtype) is None:
        return _requested
    return _choose(op, AUTO, tensor)


def companion(op: str, backend: str, tensor: Tensor) -> str:
    """Return the backend for `op`, an op on integers, when `backend` has computed the scores before it.

    That is the same one if it was requested and has the op; else the best.
    """
    if _requested == AUTO and tensor.device.type in SELF_CHECKED:
        return _choose(op, AUTO, tensor)
    return backend if can_run(op, backend, tensor.device, tensor.dtype) is None else best(op, tensor)


def use_sdpa(
    op: str, tensor: Tensor, *, plain: bool, eager: bool = True, head_dim: int = 0, training: bool = False
) -> bool:
    """Return whether torch's own fused attention runs the call: `plain`, or with a bias on keys.

    Without a bias nothing is faster. With one it is a candidate like the kernels here: on a GPU the measured times
    decide. On a CPU the kernel here is faster in bfloat16 with AMX, most of all at the odd token counts that merging
    leaves, and in float32 with a bias, with wide vectors from some token count on; the latter in `eager` calls only,
    since in a graph the token count would become a guard.
    """
    if tensor.device.type == "cpu" and (
        (native.AMX and tensor.dtype == torch.bfloat16)
        or (eager and not plain and native.WIDE_VECTORS and tensor.dtype == torch.float32 and _is_long(tensor))
    ):
        return _requested == "cuda"
    if _requested == AUTO:
        chosen = "torch" if plain else _choose(op, AUTO, tensor, head_dim, training, with_torch=True)
        return chosen in ("torch", "cpu", "reference")
    return _requested in ("cpu", "cuda")


def _is_long(q: Tensor) -> bool:
    """Return whether the CPU kernel beats torch's in float32 with a bias, q being (B, H, N, d)."""
    tokens, channels = q.shape[-2:]
    ragged = RAGGED if channels >= WIDE_HEADS else RAGGED_IF_NARROW
    return tokens >= LONG or (tokens >= ragged and tokens % TORCHS_BLOCK != 0)


def _choose(
    op: str,
    name: str,
    tensor: Tensor,
    head_dim: int = 0,
    training: bool = False,
    with_torch: bool = False,
) -> str:
    if name == AUTO and torch.jit.is_tracing():  # a traced graph, and ONNX, must run without this package
        return "torch" if with_torch else "reference"
    if head_dim and not any(head_dim > most for most in SPECS[op].max_head_dim.values()):
        head_dim = 0  # no backend limits it: keep one entry for all head dimensions, and no guard on a symbolic one
    key = op, name, tensor.device, tensor.dtype, int(head_dim), training, with_torch
    if torch.compiler.is_compiling():  # the cache would become a guard of the graph, and its growth a recompilation
        return _decide(*key)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _decide(*key)
        if device_is_known(tensor.device, op):  # else a later call may choose better
            _chosen[key] = chosen
    return chosen


def device_is_known(device: torch.device, op: str) -> bool:
    """Return whether the kernels of `op` for a device need no self-check, or have had it."""
    return device.type not in SELF_CHECKED or selfcheck.is_known(device, op)


def _decide(
    op: str,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int = 0,
    training: bool = False,
    with_torch: bool = False,
) -> str:
    if _valid("TOKRED_BACKEND", name) == AUTO:
        return _decide_automatically(op, device, dtype, head_dim, training, with_torch)
    reason = can_run(op, name, device, dtype, head_dim)
    if reason is not None:
        able = [other for other in BACKENDS if can_run(op, other, device, dtype, head_dim) is None]
        raise RuntimeError(
            f'tokred_kernels.{op}: the backend "{name}" was requested and cannot run this call: {reason}. '
            f"These can: {', '.join(able)}"
        )
    return name


# torch.compile calls this while it traces, and keeps the result; a self-check may start then, for it runs no op in this
# process. What torch.compiler.assume_constant_result does, without importing the compiler.
_decide._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _decide_automatically(
    op: str, device: torch.device, dtype: torch.dtype, head_dim: int, training: bool, with_torch: bool
) -> str:
    if SPECS[op].parts:  # one call for all parts if one backend is the best for all; else each part chooses
        parts = {_decide_automatically(part, device, dtype, head_dim, training, False) for part in SPECS[op].parts}
        return parts.pop() if len(parts) == 1 else "reference"
    for backend in candidates(op, device, dtype, training):
        if backend == "torch":
            if with_torch:
                return backend
        elif can_run(op, backend, device, dtype, head_dim) is None:
            return backend
    return "reference"


def candidates(op: str, device: torch.device, dtype: torch.dtype, training: bool) -> tuple[str, ...]:
    """Return the backends that `auto` tries, in order."""
    if device.type in SELF_CHECKED:
        return ranking(op, selfcheck.verdicts(device, op), dtype, training)
    return ("cpu", "reference") if device.type == "cpu" else ("reference",)
