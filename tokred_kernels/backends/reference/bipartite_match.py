# SPDX-License-Identifier: MIT
"""Match with the whole (B, num_src, num_dst) matrix of scores in memory: what the fused kernels must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.partition import Partition

# torch.compiler.is_exporting came with torch 2.7; before, this holds for other compilers too, which changes no result.
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
MIN_SQUARED_NORM = 1e-30  # as in csrc/common/numerics.h: under it a token is zero, and similar to nothing


def bipartite_match(metric: Tensor, partition: Partition) -> Tensor:
    """`dest` (B, N) of the map that `partition` and the cosines of `metric` give (ToMe, section 3.1)."""
    best, index = best_destination(metric, partition)
    return build_dest(best, index, metric.shape[-2], partition)


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
    scores = (a @ b.transpose(1, 2)) * inverse_norm(a) * inverse_norm(b).transpose(1, 2)
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
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).rsqrt())


def tokens(partition: Partition, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The tokens that are sources (B, num_src) and destinations (B, num_dst), int64."""
    if partition.sources is not None and partition.destinations is not None:
        return partition.sources.long(), partition.destinations.long()
    first, stride = partition.first, partition.stride
    i = torch.arange(partition.num_src, device=device)
    j = torch.arange(partition.num_dst, device=device)
    # With stride 1 there are no sources, and no stride - 1 to divide by.
    source = first + i + i // max(stride - 1, 1)
    destination = first + j * stride + stride - 1
    return source.expand(batch, -1), destination.expand(batch, -1)


def build_dest(best: Tensor, index: Tensor, num_tokens: int, partition: Partition) -> Tensor:
    """`dest` (B, N) int32 from each source's best score and destination."""
    first, num_src, num_dst, r = partition.first, partition.num_src, partition.num_dst, partition.r
    lead, interleaved = partition.protected_src, partition.protected_dst
    batch, device = best.shape[0], best.device

    order = descending(best[:, lead:]) + lead
    joined, unmerged = order[:, :r], order[:, r:]
    if partition.sources_by_index:
        unmerged = unmerged.sort(1).values
    protected = torch.arange(lead, device=device).expand(batch, -1)
    unmerged = torch.cat([protected, unmerged], 1)

    u = torch.arange(num_src - r, device=device)
    j = torch.arange(num_dst, device=device)
    unmerged_slot = first + torch.where(u < interleaved, 2 * u, u + interleaved)
    destination_slot = first + torch.where(j < interleaved, 2 * j + 1, num_src - r + j)

    source, destination = tokens(partition, batch, device)
    dest = torch.full((batch, num_tokens), -1, dtype=torch.int64, device=device)
    if first:
        dest[:, :first] = torch.arange(first, device=device)
    dest = dest.scatter(1, source.gather(1, unmerged), unmerged_slot.expand(batch, -1))
    dest = dest.scatter(1, destination, destination_slot.expand(batch, -1))
    if r:
        joined_slot = destination_slot.expand(batch, -1).gather(1, index.gather(1, joined))
        dest = dest.scatter(1, source.gather(1, joined), joined_slot)
    return dest.int()


def descending(scores: Tensor) -> Tensor:
    """The order (B, n) of scores from high to low, ties by index."""
    if not _exporting():
        return scores.argsort(dim=1, descending=True, stable=True)
    # ONNX has no stable sort. Here a score's rank is the number of those that go before it, so ties are by index in
    # whatever runtime the graph comes to; the same order, for O(n^2) comparisons.
    index = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores[:, :, None], scores[:, None, :]
    before = (other > mine) | ((other == mine) & (index < index[:, None]))
    return torch.zeros_like(scores, dtype=torch.int64).scatter(1, before.sum(-1), index.expand(scores.shape))
