# SPDX-License-Identifier: MIT
"""Find and rank the pairs of a match: the part that does not depend on how many sources join."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.reference import rank_candidates as reference
from tokred_kernels.backends.registration import register
from tokred_kernels.partition import METRIC_RULE, PACKED_RULES, RULES, SCHEMA, Partition


def rank_candidates(
    metric: Tensor, partition: Partition, backend: str, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `score`, `partner` and `rank`, (B, num_src) each, for the sources of `metric`.

    Args:
        metric: (B, N, D) or (B, H, N, d); or packed (T, D) with `cu_seqlens`. Each packed image is split into its even
            and odd tokens.
        partition: of the metric, or of the longest packed image. `partition.r` is not used.
        backend: the backend that runs the op.
        cu_seqlens: (B + 1,) int32, the starts of packed images.

    Returns:
        `score`, float32: the highest cosine; -inf for a source that is protected, holds NaN, or is missing because its
        image is shorter. `partner`, int32: the number of the destination with that cosine. `rank`, int32: the place in
        the order of descending scores, ties to the lower index; 2^31 - 1 for a source that cannot join.
    """
    if backend == "reference":
        return reference.rank_candidates(metric, partition, cu_seqlens)
    lists = partition.sources, partition.destinations
    return _rank_candidates(metric, *lists, *partition.numbers(), cu_seqlens, backend)


def _implementation(
    metric: Tensor, sources: Tensor | None, destinations: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *numbers, cu_seqlens, backend = others
    partition = Partition._make((*numbers, sources, destinations))
    return backends.implementation(backend, "rank_candidates")(metric, partition, cu_seqlens)


def _fake(
    metric: Tensor, sources: Tensor | None, destinations: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *numbers, cu_seqlens, _ = others
    images = metric.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (images, Partition(*numbers).num_src)
    return (
        metric.new_empty(shape, dtype=torch.float32),
        metric.new_empty(shape, dtype=torch.int32),
        metric.new_empty(shape, dtype=torch.int32),
    )


_rank_candidates = register(
    f"rank_candidates(Tensor metric, Tensor? sources, Tensor? destinations, {SCHEMA}, Tensor? cu_seqlens, str backend) "
    "-> (Tensor score, Tensor partner, Tensor rank)",
    _fake,
    {"metric": METRIC_RULE, **RULES},
    _implementation,
    packed={
        "metric": "float (T, D); T <= ROWS",
        "cu_seqlens": "int32 (S,); starts_of(cu_seqlens, T, N)",
        **PACKED_RULES,
    },
    by="cu_seqlens",
)
