# SPDX-License-Identifier: MIT
"""The best destination of each source, with the whole (B, num_src, num_dst) matrix of scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.reference import is_exporting, product
from tokred_kernels.partition import Partition

MIN_SQUARED_NORM = 1e-30  # as in csrc/common/numerics.h: under it a token is zero, and similar to nothing
NO_RANK = 2**31 - 1  # the rank of a source that cannot join; as in csrc/common/slots.h


def rank_candidates(
    metric: Tensor, partition: Partition, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.rank_candidates`."""
    if cu_seqlens is None:
        return _rank_candidates(metric, partition)
    lengths = cu_seqlens.diff().tolist()
    shape = (len(lengths), partition.num_src)
    score = metric.new_full(shape, -torch.inf, dtype=torch.float32)
    partner = metric.new_zeros(shape, dtype=torch.int32)
    rank = metric.new_full(shape, NO_RANK, dtype=torch.int32)
    for image, rows in enumerate(metric.split(lengths)):
        own = partition.of_tokens(rows.shape[0])
        for whole, part in zip((score, partner, rank), _rank_candidates(rows[None], own), strict=True):
            whole[image, : own.num_src] = part[0]
    return score, partner, rank


def _rank_candidates(metric: Tensor, partition: Partition) -> tuple[Tensor, Tensor, Tensor]:
    score, partner = best_destination(metric, partition)
    return rank_sources(score, partner, partition.protected_src)


def rank_sources(score: Tensor, partner: Tensor, protected: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and partners (B, num_src) with their ranks, the `protected` first sources out of the running."""
    rank = ranks(score[:, protected:])
    if protected:
        score = torch.cat([torch.full_like(score[:, :protected], -torch.inf), score[:, protected:]], 1)
        rank = torch.cat([rank.new_full(score[:, :protected].shape, NO_RANK), rank], 1)
    return score, partner.int(), rank.int()


def best_destination(metric: Tensor, partition: Partition, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The highest cosine of each source, and which destination has it (lowest number first): (B, num_src) each.

    `metric` is (B, N, D), or (B, H, N, d), whose mean over heads is rounded to its own dtype.
    """
    if metric.dim() == 4:
        metric = metric.to(dtype).mean(1).to(metric.dtype)
    metric = metric.to(dtype)
    source, destination = tokens(partition, metric.shape[0], metric.device)
    a = metric.gather(1, source[..., None].expand(-1, -1, metric.shape[2]))
    b = metric.gather(1, destination[..., None].expand(-1, -1, metric.shape[2]))
    scores = product(a, b.transpose(1, 2)) * inverse_norm(a) * inverse_norm(b).transpose(1, 2)
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    if partition.protected_dst:
        scores = scores[..., partition.protected_dst :]
    if scores.shape[-1] == 0:  # nothing to join: such a partition has r = 0
        return scores.new_full(source.shape, -torch.inf), torch.zeros_like(source)
    best, index = scores.max(-1).values, scores.argmax(-1)
    return best, index + partition.protected_dst


def inverse_norm(vectors: Tensor) -> Tensor:
    """1 / |v| for each row (..., D), as (..., 1); 0 for a zero row."""
    squared = (vectors * vectors).sum(-1, keepdim=True)
    zero = squared < MIN_SQUARED_NORM
    squared = torch.where(zero, 1.0, squared)
    # Rounded twice, as 1 / sqrt in the kernels. On CUDA rsqrt is off by up to two units; on the CPU sqrt is by one, and
    # rsqrt is the quotient.
    return torch.where(zero, 0.0, 1.0 / squared.sqrt() if squared.is_cuda else squared.rsqrt())


def tokens(partition: Partition, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens that are sources (B, num_src) and destinations (B, num_dst), int64."""
    if partition.sources is not None and partition.destinations is not None:
        return partition.sources.long(), partition.destinations.long()
    first, stride = partition.first, partition.stride
    i = torch.arange(partition.num_src, device=device)
    j = torch.arange(partition.num_dst, device=device)
    source = first + (partition.num_dst + i if stride == 1 else i + i // (stride - 1))
    destination = first + j * stride + stride - 1
    return source.expand(batch, -1), destination.expand(batch, -1)


def ranks(scores: Tensor) -> Tensor:
    """The place (B, n) of each score in the order from high to low, ties by index; int64."""
    index = torch.arange(scores.shape[1], device=scores.device)
    if not is_exporting():
        order = scores.argsort(dim=1, descending=True, stable=True)
        return torch.zeros_like(order).scatter(1, order, index.expand(scores.shape))
    # ONNX has no stable sort. Here a score's rank is the number of those that go before it, so ties are by index in
    # whatever runtime the graph comes to; the same order, for O(n^2) comparisons.
    mine, other = scores[:, :, None], scores[:, None, :]
    return ((other > mine) | ((other == mine) & (index < index[:, None]))).sum(-1)
