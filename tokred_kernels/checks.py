# SPDX-License-Identifier: MIT
"""Argument checks that several ops share: each message names the op, the argument, what is accepted and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LARGEST = 2**63 - 1  # what an int64 holds
MAX_ROWS = 2**31 - 2**12  # rows are numbered in int32, and a kernel's last block may number some that are not there

WIDEST = 2**20  # the largest embedding dimension that a module is made for; weights grow with its square


def shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape as a plain tuple, for messages."""
    return tuple(tensor.shape)


def check_floating(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a dense tensor of a floating-point dtype that the kernels take."""
    if isinstance(value, Tensor) and value.dtype not in FLOATING:
        raise TypeError(
            f"tokred_kernels.{op}: {name} must be float32, float16, bfloat16 or float64, got {value.dtype}; "
            "cast it first"
        )
    check_dense(op, name, value)


def check_dense(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"tokred_kernels.{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        layout = "a nested tensor" if value.is_nested else value.layout
        raise TypeError(f"tokred_kernels.{op}: {name} must be a dense (strided) tensor, got {layout}")


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


def check_count(op: str, name: str, value: Any, least: int = 0, most: int = LARGEST) -> int:
    """Return the integer `value` as an int (or SymInt); raise unless it is one from `least` to `most`."""
    if type(value) is not int:
        if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
            raise TypeError(f"tokred_kernels.{op}: {name} must be an int, got {_typed(value)}")
        if not isinstance(value, torch.SymInt):
            value = int(value)  # NumPy's integers overflow in sums
    if value < least:
        raise ValueError(f"tokred_kernels.{op}: {name} must be at least {least}, got {shown(value)}")
    if type(value) is int and not is_compiling() and value > most:  # else the limit would become a guard
        raise ValueError(f"tokred_kernels.{op}: {name} must be at most {most}, got {shown(value)}")
    return value


def check_flag(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless `value` is True or False."""
    if type(value) is not bool:
        raise TypeError(f"tokred_kernels.{op}: {name} must be True or False, got {shown(value)}")


def check_choice(op: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of the strings `choices`."""
    if not isinstance(value, str) or value not in choices:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"tokred_kernels.{op}: {name} must be one of {', '.join(choices)}, got {shown(value)}")


def check_real(op: str, name: str, value: Any, *, infinite: bool = False, above: float | None = None) -> float:
    """Return the number as a float; raise unless it is a number (a tensor would lose its gradient) other than NaN.

    It must be finite unless `infinite`, and greater than `above`.
    """
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"tokred_kernels.{op}: {name} must be a number, got {_typed(value)}")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"tokred_kernels.{op}: {name} must fit a float, got {shown(value)}") from error
    if is_compiling():  # the number may be symbolic, and a comparison would become a guard
        return number
    wanted = "a number" if infinite else "finite" if above is None else f"above {above}, and finite"
    if math.isnan(number) or (not infinite and math.isinf(number)) or (above is not None and number <= above):
        got = "NaN" if math.isnan(number) else value
        raise ValueError(f"tokred_kernels.{op}: {name} must be {wanted}, got {got}")
    return number


def check_device(op: str, device: Any) -> torch.device:
    """Return `device` as a torch.device; raise TypeError or ValueError unless it is one, its name or its index."""
    if isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = ValueError if isinstance(device, (str, int)) else TypeError
        raise kind(f"tokred_kernels.{op}: device must be a torch.device, got {shown(device)}") from error


def check_generator(op: str, generator: Any) -> None:
    """Raise TypeError unless `generator` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"tokred_kernels.{op}: generator must be a torch.Generator, got {_typed(generator)}")


def _typed(value: Any) -> str:
    """Return the type of a value, and the value unless it is a tensor, for a message."""
    kind = type(value).__name__
    return kind if isinstance(value, Tensor) else f"{kind} ({shown(value)})"


def shown(value: Any) -> str:
    """Return a short text of a value for a message; Python raises on printing integers of thousands of digits."""
    if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
        return f"an int of {int(value).bit_length()} bits"
    return type(value).__name__ if isinstance(value, Tensor) else repr(value)[:80]


def check_same_device(op: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if not (value.is_cpu and other.is_cpu) and value.device != other.device:
        raise ValueError(
            f"tokred_kernels.{op}: {name} is on {value.device} but {other_name} is on {other.device}; "
            "move them to one device"
        )


def prefix_length(op: str, num_prefix: int, class_token: bool, distill_token: bool) -> int | None:
    """Return `num_prefix`, or None if it is 0: then ToMe's two flags say which tokens are protected.

    Raises:
        TypeError: a flag is not a bool, or `num_prefix` is not an int.
        ValueError: `num_prefix` is negative, or is above 0 together with a flag.
    """
    if type(class_token) is not bool or type(distill_token) is not bool:
        check_flag(op, "class_token", class_token)
        check_flag(op, "distill_token", distill_token)
    num_prefix = check_count(op, "num_prefix", num_prefix)
    if num_prefix == 0:
        return None
    if class_token or distill_token:
        raise ValueError(
            f"tokred_kernels.{op}: give num_prefix or class_token/distill_token, not both, "
            f"got num_prefix={num_prefix}, class_token={class_token}, distill_token={distill_token}"
        )
    return num_prefix


def is_per_row(value: Tensor, rows: tuple[int, ...]) -> bool:
    """Return whether `value` has the shape `rows`, or `rows` and a last dimension of 1.

    Two comparisons, since `in` fails if torch.compile leaves a size symbolic.
    """
    if value.shape == rows:
        return True
    return value.shape == (*rows, 1)
