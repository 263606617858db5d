# SPDX-License-Identifier: MIT
"""Match, on the CPU and on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.native import DTYPE_CODE, address, kernels, stream
from tokred_kernels.partition import Partition


def bipartite_match(metric: Tensor, partition: Partition) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `backends.reference.bipartite_match`; this also writes the second view: dest, members, begin, count."""
    metric = inner_dense(metric)
    images, tokens, num_out = metric.shape[0], metric.shape[-2], partition.num_out()
    dest = metric.new_empty(images, tokens, dtype=torch.int32)
    members = dest.new_empty(images * tokens)
    begin = dest.new_empty(images, num_out)
    count = dest.new_empty(images, num_out)
    views = (dest.data_ptr(), members.data_ptr(), begin.data_ptr(), count.data_ptr())
    values = problem(metric, partition)
    module = kernels(metric)
    workspace = None
    if metric.is_cuda and (size := module.match_workspace_bytes(values)):
        workspace = metric.new_empty(size, dtype=torch.uint8)
    module.bipartite_match(values, *views, address(workspace), stream(metric))
    return dest, members, begin, count


def inner_dense(tensor: Tensor) -> Tensor:
    """Return the tensor if its last stride is 1, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def problem(metric: Tensor, partition: Partition) -> tuple[int, ...]:
    """Return the numbers of a MatchProblem that is not packed; see csrc/common/args.h and csrc/bindings.cpp."""
    if metric.dim() == 4:
        images, heads, tokens, channels = metric.shape
        stride_b, stride_h, stride_n, _ = metric.stride()
    else:
        (images, tokens, channels), heads = metric.shape, 1
        stride_b, stride_n, _ = metric.stride()
        stride_h = 0
    strides = stride_b, stride_h, stride_n
    sizes = images, heads, tokens, channels
    return (metric.data_ptr(), *strides, *sizes, DTYPE_CODE[metric.dtype], 0, *partition_values(partition))


def partition_values(partition: Partition) -> tuple[int, ...]:
    """Return the numbers of a Partition, with its lists as addresses."""
    return (address(partition.sources), address(partition.destinations), *partition.numbers())
