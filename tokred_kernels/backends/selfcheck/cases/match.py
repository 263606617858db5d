# SPDX-License-Identifier: MIT
"""Cases of bipartite_match and rank_candidates: metrics whose cosines are exact, and random ones without near-ties."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tokred_kernels.backends.reference.bipartite_match import bipartite_match as reference_bipartite_match
from tokred_kernels.backends.reference.build_match_map import dest_of_ranks
from tokred_kernels.backends.reference.rank_candidates import NO_RANK, best_destination, rank_sources, ranks
from tokred_kernels.backends.reference.rank_candidates import rank_candidates as reference_rank_candidates
from tokred_kernels.backends.reference.to_csr import to_csr
from tokred_kernels.backends.selfcheck.cases import compare, inputs
from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.partition import Partition, every_kth, every_other, prefix_and_rest

PARTITIONS = ("even and odd", "class token", "lists", "prefix of 5", "every 3rd", "distillation token", "importance")
SHARES = (0.4, 1.0, 0.0)  # of the sources that may join; rank_candidates does not depend on it
LENGTHS = (12, 0, 1, 2, 3, 17, 4, 7)


def partition_of(kind: str, number: int, share: float, images: int, draw: inputs.Draw) -> Partition:
    """A partition of `number` tokens in which `share` of the sources that may join do so."""
    if kind == "every 3rd":  # all sources join
        return every_kth(number, 3, min(2, number))
    if kind == "importance":  # all sources join
        return prefix_and_rest(number, number - number // 3, int(number > 2))
    if kind == "lists":
        first = number // 10
        order = draw.orders(images, number - first).int() + first
        num_dst = (number - first) // 3
        num_src = number - first - num_dst
        lists = order[:, :num_src].contiguous(), order[:, num_src:].contiguous()
        r = int(num_src * share) if num_dst else 0
        return Partition(first, 1, num_src, num_dst, 0, 0, False, r, *lists)
    prefix = min(5, number) if kind == "prefix of 5" else None
    flags = kind == "class token", kind == "distillation token" and number > 1
    protected = ((prefix + 1) // 2, prefix // 2, prefix > 0) if prefix is not None else (*map(int, flags), flags[0])
    whole = every_other(number, number, prefix, *flags)
    if whole is None:
        return Partition._make((0, 2, (number + 1) // 2, number // 2, *protected, 0, None, None))
    return namedtuple_replace(whole, r=int(whole.r * share))


def exact_metric(draw: inputs.Draw, images: int, number: int, heads: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Exact tokens (B, N, C), or keys (B, H, N, C) of 1 or 3 heads with that mean; some are not finite."""
    metric = draw.exact_tokens(images, number, channels)
    if number >= 17:
        place = draw.orders(1, number)[0]
        metric[0, place[0], 1], metric[-1, place[1], 0] = torch.nan, torch.inf
        metric[:, place[2]] = metric[:, place[3]]
        if dtype != torch.float16:
            metric[:, place[4]] *= 2.0**-70  # the squared norm is below the smallest that counts
    if heads > 1:
        apart = draw.integers(-2, 3, *metric.shape) * metric.abs().amax(-1, keepdim=True).nan_to_num(1, 1)
        metric = torch.stack([metric + apart, metric - apart, metric], 1)
    elif heads == 1:
        metric = metric[:, None]
    return metric.to(dtype)


def exact_match(metric: Tensor, partition: Partition) -> tuple[Tensor, Tensor, Tensor]:
    """Score, partner and rank in float64."""
    return rank_sources(*best_destination(metric, partition, torch.float64), partition.protected_src)


def _exact_map(metric: Tensor, partition: Partition) -> list[compare.Output]:
    _, partner, rank = exact_match(metric, partition)
    dest = dest_of_ranks(partner, rank, metric.shape[-2], partition)
    return compare.map_outputs((dest, *to_csr(dest, partition.num_out())))


def _exact_scores(metric: Tensor, partition: Partition, cu_seqlens: Tensor | None = None) -> list[compare.Output]:
    """Return the specified outputs of rank_candidates; ranks need a destination, and partners need a rank."""
    if cu_seqlens is None:
        score, partner, rank = exact_match(metric, partition)
        can_join = torch.full(rank.shape, partition.num_dst > partition.protected_dst)
    else:
        score, partner, rank = reference_rank_candidates(metric.double(), partition, cu_seqlens)
        can_join = (cu_seqlens.diff() // 2 > partition.protected_dst)[:, None].expand(rank.shape)
    return [
        compare.Output("score", score, torch.float32, compare.COSINE_BAND),
        compare.exactly("partner", partner, where=can_join & (rank != NO_RANK)),
        compare.exactly("rank", rank, where=can_join),
    ]


def _random_cosines(metric: Tensor) -> Tensor:
    """Cosines of even and odd tokens, in float64."""
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    return unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)


def _separate(draw: inputs.Draw, *shape: int, dtype: torch.dtype) -> Tensor:
    """Draw a random metric whose matches rounding cannot change: no two cosines that compete are close."""
    while True:
        metric = draw.normal(*shape).to(dtype)
        top = _random_cosines(metric).topk(2).values
        gap = min((top[..., 0] - top[..., 1]).min(), top[..., 0].sort().values.diff().min())
        if gap > compare.COSINE_BAND:
            return metric


def _check_random_scores(metric: Tensor, outputs: tuple[Tensor, ...]) -> str | None:
    """Check scores against float64, partners by their cosines, and ranks by the scores that were returned."""
    score, partner, rank = outputs
    cosines = _random_cosines(metric)
    best = cosines.amax(-1)
    if (
        partner.shape != best.shape
        or partner.dtype != torch.int32
        or not ((partner >= 0) & (partner < cosines.shape[2])).all()
    ):
        return f"partner: expected the number of a destination for each of {tuple(best.shape)} sources, int32"
    taken = cosines.gather(2, partner.long()[..., None])[..., 0]
    return (
        compare.mismatch(score, compare.Output("score", best, torch.float32, compare.COSINE_BAND))
        or compare.mismatch(taken, compare.Output("cosine with partner", best, torch.float64, compare.COSINE_BAND))
        or compare.mismatch(rank, compare.exactly("rank of score", ranks(score).int()))
    )


def cases(op: str, level: inputs.Level) -> Iterator[inputs.Case]:
    """The cases of `op`."""
    outputs = _exact_map if op == "bipartite_match" else _exact_scores
    mixed = level.mix(
        number=level.sizes(
            1, 2, 17, 197, 577, 1089, 4097, interpreted=(1, 2, 17, 34, 50, 67, 197), deep=(33, 129, 8192)
        ),
        dtype=inputs.DTYPES,
        kind=PARTITIONS,
        share=SHARES,
        layout=tuple(inputs.HEAD_LAYOUTS),
        channels=inputs.CHANNELS,
        heads=(0, 3, 1),
    )
    for number, dtype, kind, share, layout, channels, heads in mixed:
        images = 2 if number < 1000 else 1
        name = inputs.name_of(dtype, f"N={number} C={channels} H={heads} {layout}, {kind}, {share:.0%} join")
        draw = inputs.Draw(op, name)
        partition = partition_of(kind, number, share, images, draw)
        if op == "bipartite_match" and partition.r == 0 and partition.num_src:
            continue  # a map that joins nothing is the identity and needs no match
        metric = inputs.HEAD_LAYOUTS["sliced" if layout == "projected" and not heads else layout](
            exact_metric(draw, images, number, heads, channels, dtype)
        )
        yield inputs.Case(name, (metric, partition), compare.expect(functools.partial(outputs, metric, partition)))
    numbers = (17, 66) if level.interpreted else (17, 197, 577)
    for number, (dtype, channels) in itertools.product(numbers, zip(inputs.DTYPES, (72, 33, 64), strict=True)):
        name = inputs.name_of(dtype, f"N={number} C={channels} random")
        draw = inputs.Draw(op, name)
        partition = partition_of("even and odd", number, 0.5, 1, draw)
        if op == "bipartite_match":
            metric = _separate(draw, 1, number, channels, dtype=dtype)
            yield inputs.Case(name, (metric, partition), compare.expect(functools.partial(outputs, metric, partition)))
        else:
            metric = draw.normal(1, number, channels).to(dtype)
            yield inputs.Case(name, (metric, partition), functools.partial(_check_random_scores, metric))
    if op == "rank_candidates":
        yield from _packed_cases(level)


def _packed_cases(level: inputs.Level) -> Iterator[inputs.Case]:
    for prefix, dtype in zip((0, 1, 2, 5), (*inputs.DTYPES, torch.float32), strict=True):
        lengths = LENGTHS if level.interpreted else (*LENGTHS, 197, 577)
        starts, longest = inputs.row_starts(lengths), max(lengths)
        name = inputs.name_of(dtype, f"packed, prefix of {prefix}")
        draw = inputs.Draw(name)
        partition = every_other(longest, longest, prefix, False, False)
        assert partition is not None
        metric = inputs.HEAD_LAYOUTS["sliced"](draw.exact_tokens(int(starts[-1]), 33).to(dtype))
        arguments = metric, partition, starts
        yield inputs.Case(name, arguments, compare.expect(functools.partial(_exact_scores, *arguments)))


def reference_call(op: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The reference's outputs, as the kernels have them."""
    if op == "rank_candidates":
        return reference_rank_candidates(*arguments)
    metric, partition = arguments
    dest = reference_bipartite_match(metric, partition)
    return (dest, *to_csr(dest, partition.num_out()))


def timing_cases(op: str) -> Iterator[inputs.TimingCase]:
    """Keys of ViT-S and ViT-L, and the tokens of a diffusion model without heads."""
    for (images, heads, number, channels, r), dtype in itertools.product(
        ((64, 6, 197, 64, 16), (16, 16, 577, 64, 23), (4, 0, 4096, 64, 2000)), inputs.TIMED_DTYPES
    ):
        shape = (images, heads, number, channels) if heads else (images, number, channels)
        name = inputs.name_of(dtype, "x".join(map(str, shape)))
        metric = inputs.Draw(op, name).normal(*shape).to(dtype)
        partition = every_other(number, r, 0, False, False)
        yield inputs.TimingCase(name, dtype, (metric, partition))
