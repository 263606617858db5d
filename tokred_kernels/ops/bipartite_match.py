# SPDX-License-Identifier: MIT
"""ToMe's bipartite soft matching, and the registered match op that other selectors call too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.reference import bipartite_match as reference
from tokred_kernels.backends.registration import register
from tokred_kernels.checks import check_count, check_metric, prefix_length
from tokred_kernels.ops.autograd import constant
from tokred_kernels.partition import METRIC_RULE, RULES, SCHEMA, Partition, every_other
from tokred_kernels.token_map import TokenMap


def bipartite_match(
    metric: Tensor,
    r: int,
    *,
    class_token: bool = False,
    distill_token: bool = False,
    num_prefix: int = 0,
) -> TokenMap:
    """Choose the `r` most similar pairs of an even token and an odd token to merge (ToMe, section 3.1, algorithm 1).

    Even tokens are sources and odd tokens are destinations. Each source proposes the destination of highest cosine
    similarity, in float32; the `r` sources of highest similarity join theirs. Ties go to the lower index. A token of
    norm 0 has similarity 0 with all tokens, and a number always beats NaN. The slots are the unmerged sources by
    descending similarity (by index if a prefix or the class token is protected), then the destinations by index.

    Args:
        metric: (B, N, D), or keys (B, H, N, d), whose mean over heads is used. Not differentiated.
        r: how many tokens to remove, capped at half of the unprotected tokens.
        class_token: token 0 is never merged.
        distill_token: token 1 is never merged, and stays second.
        num_prefix: the number of protected leading tokens, instead of the two flags. They come first in the output, in
            order.

    Returns:
        A TokenMap from N to N - min(r, (N - protected) // 2) slots; the identity if no token is removed.

    Raises:
        TypeError: `metric` is not a floating-point tensor, or `r` is not an int.
        ValueError: wrong rank, `r < 0`, or `num_prefix` together with a flag.
        RuntimeError: the backend requested by name cannot run the call.

    O(N^2 D) operations and O(N) memory in the kernels.
    """
    check_metric("bipartite_match", metric)
    r = check_count("bipartite_match", "r", r)
    prefix = prefix_length("bipartite_match", num_prefix, class_token, distill_token)
    return match(metric, every_other(metric.shape[-2], r, prefix, class_token, distill_token))


def match(metric: Tensor, partition: Partition | None) -> TokenMap:
    """Return the map of the match of `metric` by `partition`; the identity if `partition` is None."""
    if partition is None:
        return TokenMap.identity(metric.shape[0], metric.shape[-2], metric.device)
    metric = constant(metric)
    backend = backends.choose("bipartite_match", metric)
    if backend == "reference":
        return TokenMap._trusted(reference.bipartite_match(metric, partition), partition.num_out())
    dest, members, begin, count = _match(
        metric, partition.sources, partition.destinations, *partition.numbers(), backend
    )
    return TokenMap._trusted(dest, partition.num_out(), members, begin, count)


def _implementation(
    metric: Tensor, sources: Tensor | None, destinations: Tensor | None, *numbers_and_backend: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *numbers, backend = numbers_and_backend
    return backends.implementation(backend, "bipartite_match")(
        metric, Partition._make((*numbers, sources, destinations))
    )


def _fake(
    metric: Tensor, sources: Tensor | None, destinations: Tensor | None, *numbers_and_backend: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_map(metric, Partition(*numbers_and_backend[:-1]))


def fake_map(metric: Tensor, partition: Partition) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return empty `dest`, `members`, `begin` and `count` of the right shapes and dtypes."""
    batch, tokens = metric.shape[0], metric.shape[-2]
    slots = (batch, partition.num_out())
    return (
        metric.new_empty((batch, tokens), dtype=torch.int32),
        metric.new_empty(batch * tokens, dtype=torch.int32),
        metric.new_empty(slots, dtype=torch.int32),
        metric.new_empty(slots, dtype=torch.int32),
    )


_match = register(
    f"bipartite_match(Tensor metric, Tensor? sources, Tensor? destinations, {SCHEMA}, str backend) "
    "-> (Tensor dest, Tensor members, Tensor begin, Tensor count)",
    _fake,
    {"metric": METRIC_RULE, **RULES},
    _implementation,
)
