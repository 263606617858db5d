# SPDX-License-Identifier: MIT
"""Build the token map of a match from partners, ranks and the number of tokens that join."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.reference import build_match_map as reference
from tokred_kernels.backends.registration import register
from tokred_kernels.ops.counts import packing_after
from tokred_kernels.packing import Packing
from tokred_kernels.partition import PACKED_RULES, RULES, SCHEMA, Partition
from tokred_kernels.token_map import TokenMap


def build_match_map(
    partner: Tensor,
    rank: Tensor,
    partition: Partition,
    num_tokens: int,
    backend: str,
    counts: Tensor | None = None,
    packed_in: Packing | None = None,
) -> TokenMap:
    """Return the map that merges the sources of lowest rank into their partners.

    Args:
        partner, rank: (B, num_src), from `rank_candidates`.
        partition: of the metric; `partition.r` sources of each image join, unless `counts` is given.
        num_tokens: N, or T if the input is packed.
        backend: the backend that computed `rank`.
        counts: (B,) int32, how many sources of each image join; then the map is packed. An image without any keeps its
            tokens in order. Read back to the host once.
        packed_in: the packing of the input, or None.
    """
    packed = None
    if counts is not None:
        lengths = (num_tokens,) * partner.shape[0] if packed_in is None else packed_in.lengths
        packed = packing_after(lengths, counts)
    starts = (
        None if packed_in is None else packed_in.cu_seqlens,
        None if packed is None else packed.cu_seqlens,
    )
    num_out = partition.num_out() if packed is None else packed.rows
    if backend != "reference":
        backend = backends.companion("build_match_map", backend, partner)
    if backend == "reference" and packed is None:  # a selector that is exported computes only `dest`
        return TokenMap._trusted(reference.dest_of_ranks(partner, rank, num_tokens, partition), num_out)
    if backend == "reference":
        views = reference.build_match_map(partner, rank, partition, num_tokens, counts, *starts, num_out)
    else:
        lists = partition.sources, partition.destinations
        others = counts, *starts, num_out, backend
        views = _build_match_map(partner, rank, *lists, *partition.numbers(), num_tokens, *others)
    return TokenMap._trusted(views[0], num_out, *views[1:], packed, packed_in)


def _implementation(
    partner: Tensor, rank: Tensor, sources: Tensor | None, destinations: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *numbers, num_tokens, counts, starts_in, starts_out, num_out, backend = others
    partition = Partition._make((*numbers, sources, destinations))
    function = backends.implementation(backend, "build_match_map")
    return function(partner, rank, partition, num_tokens, counts, starts_in, starts_out, num_out)


def _fake(
    partner: Tensor, rank: Tensor, sources: Tensor | None, destinations: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, num_tokens, counts, starts_in, _, num_out, _ = others
    images = partner.shape[0]
    slots = (images, num_out) if counts is None else (num_out,)
    rows = num_tokens if starts_in is not None else images * num_tokens
    return (
        partner.new_empty((num_tokens,) if starts_in is not None else (images, num_tokens), dtype=torch.int32),
        partner.new_empty(rows, dtype=torch.int32),
        partner.new_empty(slots, dtype=torch.int32),
        partner.new_empty(slots, dtype=torch.int32),
    )


_build_match_map = register(
    f"build_match_map(Tensor partner, Tensor rank, Tensor? sources, Tensor? destinations, {SCHEMA}, SymInt num_tokens, "
    "Tensor? counts, Tensor? starts_in, Tensor? starts_out, SymInt num_out, str backend) "
    "-> (Tensor dest, Tensor members, Tensor begin, Tensor count)",
    _fake,
    {
        "partner": "int32 (B, num_src); entries(partner, 0, max(num_dst, 1))",
        "rank": "int32 (B, num_src); ranks(rank, protected_src, lengths(None, B, num_src))",
        "N": "num_tokens",
        **RULES,
        "num_tokens": "0 <= num_tokens and B * N <= ROWS and (counts is None) == (starts_out is None)",
        "counts": "int32 (B,); entries(counts, 0, num_src - protected_src + 1 if protected_dst < num_dst else 1)",
        "starts_in": "int32 (B + 1,)",
        "starts_out": "int32 (B + 1,); follows(starts_out, lengths(starts_in, B, N) - counts, num_out)",
        "num_out": "counts is not None or num_out == first + num_src - r + num_dst",
    },
    _implementation,
    packed={
        "partner": "int32 (B, num_src); partners(partner, starts_in)",
        "rank": "int32 (B, num_src); ranks(rank, protected_src, (lengths(starts_in, 0, 0) + 1) // 2)",
        **PACKED_RULES,
        "num_tokens": "0 <= num_tokens <= ROWS and counts is not None and starts_out is not None",
        "counts": "int32 (B,); joinable(counts, starts_in, protected_src, protected_dst)",
        "starts_in": "int32 (B + 1,); starts_of(starts_in, num_tokens, N)",
    },
    by="starts_in",
)
