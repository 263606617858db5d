# SPDX-License-Identifier: MIT
"""What the self-check computes, and what is right: the cases of every op, with expected outputs from the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tokred_kernels.backends.selfcheck.cases import attention, lookup, maps, match, merge, windows
from tokred_kernels.backends.selfcheck.cases.attention import sdpa_call
from tokred_kernels.backends.selfcheck.cases.inputs import Case, Level, TimingCase

__all__ = ["Case", "TimingCase", "cases", "reference_call", "sdpa_call", "timing_cases"]

_FAMILIES: dict[str, Any] = {
    "bipartite_match": match,
    "rank_candidates": match,
    "build_match_map": maps,
    "window_similarity": windows,
    "window_map": windows,
    "count_above_threshold": maps,
    "merge": merge,
    "merge_backward": merge,
    "unmerge": merge,
    "keep_topk": maps,
    "token_attention": attention,
    "token_attention_backward": attention,
    "lookup_gather": lookup,
    "lookup_gather_backward": lookup,
    "lookup_scatter": lookup,
    "lookup_scatter_backward": lookup,
    "to_csr": maps,
    "compose": maps,
}


def cases(op: str, *, interpreted: bool = False, deep: bool = False) -> Iterator[Case]:
    """Yield the cases of `op`, each built when it is asked for, always the same.

    Args:
        op: a name of `backends.OPS`.
        interpreted: build few and small cases, for Triton's interpreter.
        deep: build many more combinations and larger sizes.
    """
    return _FAMILIES[op].cases(op, Level(interpreted, deep))


def reference_call(op: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Compute `op` by backends/reference, on the device of the arguments; return the outputs of the kernels, in order.

    Gradients come from autograd through the reference's forward, so their time includes that of the forward.
    """
    return _FAMILIES[op].reference_call(op, arguments)


def timing_cases(op: str) -> list[TimingCase]:
    """Return calls of `op` at the sizes of common models; ops of integers have one dtype only."""
    return list(_FAMILIES[op].timing_cases(op))
