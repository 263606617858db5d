# SPDX-License-Identifier: MIT
"""The map that partners and ranks give."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.reference.rank_candidates import tokens
from tokred_kernels.backends.reference.to_csr import to_csr
from tokred_kernels.namedtuples import namedtuple_replace
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
    """See `ops.build_match_map`."""
    if counts is None or starts_out is None:
        dest = dest_of_ranks(partner, rank, num_tokens, partition)
        return dest, *to_csr(dest, partition.num_out())
    rows = [num_tokens] * len(counts) if starts_in is None else starts_in.diff().tolist()
    parts = []
    for image, (length, r, start) in enumerate(zip(rows, counts.tolist(), starts_out.tolist(), strict=False)):
        own = namedtuple_replace(partition.of_tokens(length), r=r)
        ours = slice(image, image + 1), slice(own.num_src)
        parts.append(dest_of_ranks(partner[ours], rank[ours], length, own)[0] + start)
    dest = torch.cat(parts).int() if parts else partner.new_zeros(0)
    members, begin, count = to_csr(dest[None], num_out)
    return dest if starts_in is not None else dest.view(-1, num_tokens), members, begin[0], count[0]


def dest_of_ranks(partner: Tensor, rank: Tensor, num_tokens: int, partition: Partition) -> Tensor:
    """Return `dest` (B, N) int32 of the map in which sources with ranks below `partition.r` join their partners."""
    first, num_src, num_dst, r = partition.first, partition.num_src, partition.num_dst, partition.r
    # Each protected destination follows an unmerged source, if any remains.
    lead, interleaved = partition.protected_src, min(partition.protected_dst, num_src - r)
    batch, device = rank.shape[0], rank.device
    if r == 0:
        token = torch.arange(num_tokens, dtype=torch.int32, device=device)
        return torch.where(token < first + num_src + num_dst, token, -1).repeat(batch, 1)

    i = torch.arange(num_src, device=device)
    j = torch.arange(num_dst, device=device)
    joins = rank < r
    by_rank = torch.where(i < lead, i, lead + rank.long() - r)
    u = (~joins).long().cumsum(1) - 1 if partition.sources_by_index else by_rank
    unmerged_slot = first + torch.where(u < interleaved, 2 * u, u + interleaved)
    destination_slot = (first + torch.where(j < interleaved, 2 * j + 1, num_src - r + j)).expand(batch, -1)
    source_slot = torch.where(joins, destination_slot.gather(1, partner.long()), unmerged_slot)

    source, destination = tokens(partition, batch, device)
    leading = torch.arange(first, device=device).expand(batch, -1)
    dest = torch.cat([leading, leading.new_full((batch, num_tokens - first), -1)], 1)
    return dest.scatter(1, destination, destination_slot).scatter(1, source, source_slot).int()
