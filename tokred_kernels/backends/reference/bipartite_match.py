# SPDX-License-Identifier: MIT
"""Match: the best destination of each source, then the map. What the fused kernels must equal."""

from __future__ import annotations

from torch import Tensor

from tokred_kernels.backends.reference.build_match_map import dest_of_ranks
from tokred_kernels.backends.reference.rank_candidates import rank_candidates
from tokred_kernels.partition import Partition


def bipartite_match(metric: Tensor, partition: Partition) -> Tensor:
    """Return `dest` (B, N) of the match of `metric` by `partition` (ToMe, section 3.1)."""
    _, partner, rank = rank_candidates(metric, partition)
    return dest_of_ranks(partner, rank, metric.shape[-2], partition)
