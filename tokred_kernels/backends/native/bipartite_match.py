# SPDX-License-Identifier: MIT
"""Match, on the CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.native import DTYPE_CODE, address, kernels, stream
from tokred_kernels.partition import Partition


def bipartite_match(metric: Tensor, partition: Partition) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `backends.reference.bipartite_match`; this also writes the second view: dest, members, begin, count."""
    if metric.stride(-1) != 1 and metric.shape[-1] != 1:
        metric = metric.contiguous()
    if metric.dim() == 4:
        images, heads, tokens, channels = metric.shape
        stride_b, stride_h, stride_n, _ = metric.stride()
    else:
        (images, tokens, channels), heads = metric.shape, 1
        stride_b, stride_n, _ = metric.stride()
        stride_h = 0
    first, stride, num_src, num_dst, protected_src, protected_dst, by_index, r, sources, destinations = partition
    num_out = partition.num_out
    dest = metric.new_empty((images, tokens), dtype=torch.int32)
    members = dest.new_empty(images * tokens)
    begin = dest.new_empty((images, num_out))
    count = dest.new_empty((images, num_out))
    problem = (
        *(metric.data_ptr(), stride_b, stride_h, stride_n, images, heads, tokens, channels, DTYPE_CODE[metric.dtype]),
        *(address(sources), address(destinations), first, stride, num_src, num_dst),
        *(protected_src, protected_dst, int(by_index), r),
    )
    module = kernels(metric)
    workspace = None
    if metric.is_cuda and (size := module.match_workspace_bytes(*problem)):
        workspace = metric.new_empty(size, dtype=torch.uint8)
    views = (dest.data_ptr(), members.data_ptr(), begin.data_ptr(), count.data_ptr())
    module.bipartite_match(*problem, *views, address(workspace), stream(metric))
    return dest, members, begin, count
