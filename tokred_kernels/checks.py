# SPDX-License-Identifier: MIT
"""Argument checks that several ops share: each message names the op, the argument, what is accepted and what came."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_ROWS = 2**31 - 2**12  # rows are numbered in int32, and a kernel's last block may number some that are not there


def shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape as a plain tuple, for messages."""
    return tuple(tensor.shape)


def check_floating(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a dense tensor of a floating dtype that the kernels know."""
    if not isinstance(value, Tensor):
        raise TypeError(f"tokred_kernels.{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"tokred_kernels.{op}: {name} must be float32, float16, bfloat16 or float64, got {value.dtype}; "
            "cast it first"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"tokred_kernels.{op}: {name} must be a dense (strided) tensor, got {value.layout}")


def check_tokens(op: str, name: str, value: Any, packed: bool = False) -> None:
    """Raise unless `value` is a floating (B, N, C) tensor, or, packed, (T, C)."""
    check_floating(op, name, value)
    if value.dim() != (2 if packed else 3):
        wanted = "(T, C), packed" if packed else "(B, N, C)"
        raise ValueError(f"tokred_kernels.{op}: {name} must be {wanted}, got shape {shape(value)}")


def check_metric(op: str, value: Any) -> None:
    """Raise unless `value` is a floating (B, N, D) or (B, H, N, d) tensor."""
    check_floating(op, "metric", value)
    if value.dim() not in (3, 4):
        raise ValueError(
            f"tokred_kernels.{op}: metric must be (B, N, D) or keys (B, H, N, d), got shape {shape(value)}"
        )
    if value.dim() == 4 and value.shape[1] == 0:
        raise ValueError(f"tokred_kernels.{op}: metric must have at least one head, got shape {shape(value)}")
    if has_too_many(value.shape[0] * value.shape[-2]):
        raise ValueError(
            f"tokred_kernels.{op}: metric may have at most {MAX_ROWS} tokens in all, got shape {shape(value)}"
        )


def has_too_many(rows: int | torch.SymInt) -> bool:
    """Return whether there are more than MAX_ROWS rows; False if torch.export or torch.compile leaves the number open.

    A comparison would become a guard there, and limit the sizes that the exported program takes.
    """
    if torch.compiler.is_compiling():  # then the module is loaded; importing it takes half a second
        return torch.fx.experimental.symbolic_shapes.statically_known_true(rows > MAX_ROWS)
    return bool(rows > MAX_ROWS)


def check_count(op: str, name: str, value: Any, least: int = 0) -> None:
    """Raise unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"tokred_kernels.{op}: {name} must be an int, got {type(value).__name__} ({value!r})")
    if value < least:
        raise ValueError(f"tokred_kernels.{op}: {name} must be at least {least}, got {value}")


def check_real(op: str, name: str, value: Any) -> float:
    """The number as a float; raise TypeError unless it is one: a tensor would lose its gradient."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"tokred_kernels.{op}: {name} must be a number, got {type(value).__name__}")
    return float(value)


def check_same_device(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if value.device != other.device:
        raise ValueError(
            f"tokred_kernels.{op}: {name} is on {value.device} but {other_name} is on {other.device}; "
            "move them to one device"
        )


def prefix_length(op: str, num_prefix: int | None, class_token: bool, distill_token: bool) -> int | None:
    """The number of protected leading tokens where `num_prefix` says it, None where ToMe's two flags do."""
    if num_prefix is None:
        return None
    check_count(op, "num_prefix", num_prefix)
    if class_token or distill_token:
        raise ValueError(
            f"tokred_kernels.{op}: give num_prefix or class_token/distill_token, not both, "
            f"got num_prefix={num_prefix}, class_token={class_token}, distill_token={distill_token}"
        )
    return num_prefix


def is_per_row(value: Tensor, rows: tuple[int, ...]) -> bool:
    """Whether `value` has the shape `rows`, or that and a dimension of 1.

    Compared one by one: where torch.compile leaves a number open, `in` finds none.
    """
    if value.shape == rows:
        return True
    return value.shape == (*rows, 1)
