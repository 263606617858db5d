# SPDX-License-Identifier: MIT
"""The part of a match that does not depend on how many tokens join: who would join whom, and in what order."""

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
    """`score`, `partner` and `rank`, (B, num_src) each, of the sources of `metric`.

    `metric` is (B, N, D) or (B, H, N, d); or, with `cu_seqlens` (B + 1,) int32, packed (T, D), where each image is
    split into even and odd tokens by itself and `partition` is that of the longest one.

    `score`, float32, is the highest cosine; -inf of a source that is protected, or absent because its image is shorter,
    or similar to nothing because it holds NaN. `partner`, int32, is the number of the destination that has it. `rank`,
    int32, is the place in the order of descending scores, ties to the lower index; 2^31 - 1 of a source that may not
    join. `partition.r` is not looked at.
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
