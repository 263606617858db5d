# SPDX-License-Identifier: MIT
"""Rank the backends that passed the self-check on a GPU by their measured times."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tokred_kernels.backends.selfcheck.verdict import Verdict
from tokred_kernels.ops.registry import SPECS

# "torch" is scaled_dot_product_attention with the logarithm of the sizes as a bias on the keys.
FIXED_ORDER = ("cuda", "triton", "torch", "reference")
# Times that differ by less than this are a draw, and the fixed order decides.
DRAW = 1.05


def ranking(
    op: str, verdicts: Mapping[str, Mapping[str, Verdict]], dtype: torch.dtype, training: bool
) -> tuple[str, ...]:
    """Return the backends that may run `op`, best first; the reference is always among them.

    A backend must have passed the self-check in `op`, and, if `training`, in the op that computes its gradient. Passed
    backends without times come after those with times, in the fixed order.
    """
    ops = (op, SPECS[op].backward) if training and SPECS[op].backward else (op,)
    passed = [name for name in FIXED_ORDER if name == "reference" or _passed(verdicts.get(name, {}), ops)]
    times = {name: _time(verdicts.get(name, {}), _timed(name, ops), dtype) for name in passed}
    known = {name: time for name, time in times.items() if time is not None}
    if not known:
        return tuple(passed)
    fastest = min(known.values())
    drawn = [name for name in passed if name in known and known[name] <= DRAW * fastest]
    slower = sorted((name for name in known if name not in drawn), key=known.__getitem__)
    return (*drawn, *slower, *(name for name in passed if name not in known))


def _timed(backend: str, ops: tuple[str, ...]) -> tuple[str, ...]:
    """Return the ops whose times add up: where autograd makes the gradients, their time includes the forward."""
    return ops[-1:] if backend in ("torch", "reference") and ops[-1].endswith("_backward") else ops


def _passed(verdicts: Mapping[str, Verdict], ops: tuple[str, ...]) -> bool:
    return all(op in verdicts and verdicts[op].is_passed for op in ops)


def _time(verdicts: Mapping[str, Verdict], ops: tuple[str, ...], dtype: torch.dtype) -> float | None:
    """Return the total time of `ops` over the shapes with this dtype, or None if one was not timed."""
    total = 0.0
    for op in ops:
        times = verdicts[op].times_us if op in verdicts else {}
        names = [""] if SPECS[op].is_integer else [str(dtype)[6:]]
        if dtype == torch.float16:  # timed as bfloat16: the same bytes and the same matrix units
            names.append("bfloat16")
        chosen = next((found for name in names if (found := [t for n, t in times.items() if n.startswith(name)])), None)
        if chosen is None:
            return None
        total += sum(chosen)
    return total
