# SPDX-License-Identifier: MIT
"""The best destination of each source and its rank, on the CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.native import DTYPE_CODE, address, kernels, stream
from tokred_kernels.backends.native.bipartite_match import inner_dense, partition_values, problem
from tokred_kernels.partition import Partition


def rank_candidates(
    metric: Tensor, partition: Partition, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.rank_candidates`."""
    metric = inner_dense(metric)
    if cu_seqlens is None:
        images, values = metric.shape[0], problem(metric, partition)
    else:
        images, channels = cu_seqlens.shape[0] - 1, metric.shape[1]
        sizes = images, 1, partition.num_src + partition.num_dst, channels
        starts = cu_seqlens.data_ptr()
        code = DTYPE_CODE[metric.dtype]
        values = (metric.data_ptr(), 0, 0, metric.stride(0), *sizes, code, starts, *partition_values(partition))
    score = metric.new_empty(images, partition.num_src, dtype=torch.float32)
    partner = metric.new_empty(score.shape, dtype=torch.int32)
    rank = torch.empty_like(partner)
    module = kernels(metric)
    workspace = None
    if metric.is_cuda and (size := module.rank_candidates_workspace_bytes(values)):
        workspace = metric.new_empty(size, dtype=torch.uint8)
    outputs = score.data_ptr(), partner.data_ptr(), rank.data_ptr()
    module.rank_candidates(values, *outputs, address(workspace), stream(metric))
    return score, partner, rank
