# SPDX-License-Identifier: MIT
"""ToMe's match and merge in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.registration import register
from tokred_kernels.checks import (
    check_count,
    check_floating,
    check_metric,
    check_same_device,
    check_tokens,
    prefix_length,
    shape,
)
from tokred_kernels.ops import bipartite_match as match_op
from tokred_kernels.ops import merge as merge_op
from tokred_kernels.ops.autograd import is_differentiated
from tokred_kernels.ops.merge import prepare_weight
from tokred_kernels.ops.merge_wavg import format_size, merge_wavg
from tokred_kernels.partition import METRIC_RULE, NO_LISTS, RULES, SCHEMA, Partition, every_other
from tokred_kernels.token_map import TokenMap


class MergeOutput(NamedTuple):
    """The result of `bipartite_merge`: tokens `x` (B, N', C), their float32 `size` (B, N', 1), and the `token_map`."""

    x: Tensor
    size: Tensor
    token_map: TokenMap


def bipartite_merge(
    x: Tensor,
    r: int,
    *,
    metric: Tensor | None = None,
    size: Tensor | None = None,
    class_token: bool = False,
    distill_token: bool = False,
    num_prefix: int = 0,
) -> MergeOutput:
    """Merge the `r` most similar pairs of tokens by size-weighted average (ToMe, section 3.1): match, then merge_wavg.

    Args:
        x: (B, N, C).
        r: how many tokens to remove, capped at half of the unprotected tokens.
        metric: (B, N, D), or keys (B, H, N, d), the vectors to compare; default `x`. Not differentiated.
        size: (B, N, 1) or (B, N), how many original tokens each token represents; None means 1 each.
        class_token, distill_token, num_prefix: the protected tokens, as in `bipartite_match`.

    Returns:
        MergeOutput(x (B, N', C), size (B, N', 1), token_map).

    Differentiable once in `x` and `size`. Raises the errors of `bipartite_match` and `merge_wavg`, and ValueError if
    the metric does not have x's B, N and device. Two kernel launches on a GPU.
    """
    op = "bipartite_merge"
    check_tokens(op, "x", x)
    r = check_count(op, "r", r)
    if metric is None:
        metric = x
    else:
        check_metric(op, metric)
        if metric.shape[0] != x.shape[0] or metric.shape[-2] != x.shape[1]:
            raise ValueError(
                f"tokred_kernels.{op}: metric must have x's B and N: metric is {shape(metric)}, x is {shape(x)}"
            )
        check_same_device(op, "metric", metric, "x", x)
    if size is not None:
        check_floating(op, "size", size)
    prefix = prefix_length(op, num_prefix, class_token, distill_token)
    partition = every_other(x.shape[1], r, prefix, class_token, distill_token)
    # A metric of another dtype may need another backend.
    in_two_calls = partition is None or is_differentiated(x, size) or metric.dtype != x.dtype
    backend = "reference" if in_two_calls else backends.choose(op, x)
    if partition is None or backend == "reference":
        token_map = match_op.match(metric, partition)
        return MergeOutput(*merge_wavg(x, token_map, size), token_map)

    weight = None if size is None else prepare_weight(op, "size", size, x)
    y, total, dest, members, begin, count = _bipartite_merge(x, metric, weight, *partition.numbers(), backend)
    token_map = TokenMap._trusted(dest, partition.num_out(), members, begin, count)
    return MergeOutput(y, format_size(total, size, column=size is None or size.dim() == 3), token_map)


def _implementation(x: Tensor, metric: Tensor, weight: Tensor | None, *numbers_and_backend: Any) -> tuple[Tensor, ...]:
    *numbers, backend = numbers_and_backend
    dest, *views = backends.implementation(backend, "bipartite_match")(metric, Partition(*numbers))
    y, total = backends.implementation(backend, "merge")(x, weight, *views, "mean", True)
    return y, total, dest, *views


def _fake(x: Tensor, metric: Tensor, weight: Tensor | None, *numbers_and_backend: Any) -> tuple[Tensor, ...]:
    dest, *views = match_op.fake_map(metric, Partition(*numbers_and_backend[:-1]))
    y, total = merge_op.fake_merge(x, views[1], weight_sum=True)
    return y, total, dest, *views


# Without gradients, one registered call runs both kernels: at batch 1 the host's time for a call dominates.
_bipartite_merge = register(
    f"bipartite_merge(Tensor x, Tensor metric, Tensor? weight, {SCHEMA}, str backend) "
    "-> (Tensor y, Tensor weight_sum, Tensor dest, Tensor members, Tensor begin, Tensor count)",
    _fake,
    {"x": "float (B, N, C)", "metric": METRIC_RULE, "weight": "sums (B, N)", **RULES, **NO_LISTS},
    _implementation,
)
