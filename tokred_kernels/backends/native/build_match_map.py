# SPDX-License-Identifier: MIT
"""The map of a match, on the CPU and on CUDA."""

from __future__ import annotations

from torch import Tensor

from tokred_kernels.backends.native import address, kernels, stream
from tokred_kernels.backends.native.bipartite_match import partition_values
from tokred_kernels.partition import Partition


def build_match_map(
    partner: Tensor,
    rank: Tensor,
    partition: Partition,
    num_tokens: int,
    counts: Tensor | None = None,
    starts_in: Tensor | None = None,
    starts_out: Tensor | None = None,
    num_out: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `ops.build_match_map`: dest, members, begin, count."""
    images = partner.shape[0]
    slots = (images, partition.num_out()) if counts is None else (num_out,)
    dest = partner.new_empty((num_tokens,) if starts_in is not None else (images, num_tokens))
    members = partner.new_empty(dest.numel())
    begin, count = partner.new_empty(slots), partner.new_empty(slots)
    kernels(partner).build_match_map(
        *(partition_values(partition), partner.data_ptr(), rank.data_ptr(), images, num_tokens),
        *(address(counts), address(starts_in), address(starts_out), num_out),
        *(dest.data_ptr(), members.data_ptr(), begin.data_ptr(), count.data_ptr(), stream(partner)),
    )
    return dest, members, begin, count
