# SPDX-License-Identifier: MIT
"""The cases of the self-check for every op, with expected outputs from the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tokred_kernels.backends.selfcheck.cases import attention, lookup, maps, match, merge, windows
from tokred_kernels.backends.selfcheck.cases.attention import sdpa_call
from tokred_kernels.backends.selfcheck.cases.inputs import Case, Level, TimingCase
from tokred_kernels.ops.registry import SPECS

__all__ = ["Case", "TimingCase", "cases", "reference_call", "sdpa_call", "timing_cases"]

_FAMILIES: dict[str, Any] = {
    "match": match,
    "maps": maps,
    "windows": windows,
    "merge": merge,
    "attention": attention,
    "lookup": lookup,
}


def _module(op: str) -> Any:
    return _FAMILIES[SPECS[op].family]


def cases(op: str, *, interpreted: bool = False, deep: bool = False) -> Iterator[Case]:
    """Yield the cases of `op`, each built when it is asked for, always the same.

    Args:
        op: a name in `ops.registry.OPS`.
        interpreted: build few and small cases, for Triton's interpreter.
        deep: build many more combinations and larger sizes.
    """
    return _module(op).cases(op, Level(interpreted, deep))


def reference_call(op: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Compute `op` by backends/reference, on the device of the arguments; return the outputs of the kernels, in order.

    Gradients come from autograd through the reference's forward, so their time includes that of the forward.
    """
    return _module(op).reference_call(op, arguments)


def timing_cases(op: str) -> list[TimingCase]:
    """Return calls of `op` at the sizes of common models; ops of integers have one dtype only."""
    return list(_module(op).timing_cases(op))
