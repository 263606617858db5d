# SPDX-License-Identifier: MIT
"""Calls of the emulated bipartite_match and rank_candidates, and comparisons with the reference backend."""

import torch
from emulated import DTYPES, assert_map, flat, poisoned

from tokred_kernels.backends.reference import bipartite_match, rank_candidates
from tokred_kernels.partition import Partition

STREAMING_SHARED = 82_000  # enough to stream any metric, too little for most to stay
NONE, SOURCES, ALL = range(3)  # what stays: Resident in match_config.h


def match_problem(metric, p):
    images, heads, tokens, channels = metric.shape
    strides = (metric.stride(0), metric.stride(1), metric.stride(2))
    return (*strides, images, heads, tokens, channels, DTYPES[metric.dtype], *map(int, p[:8]))


def lists_of(p):
    return [None if t is None else t.contiguous().flatten() for t in (p.sources, p.destinations)]


def emulated_match(emulator, metric, p, **options):
    """dest, members, begin, count of a (B, H, N, D) metric."""
    images, _, tokens, _ = metric.shape
    outputs = poisoned(images * tokens, images * tokens, images * p.num_out(), images * p.num_out())
    emulator.call("bipartite_match", match_problem(metric, p), [flat(metric), None, *lists_of(p), *outputs], **options)
    dest, members, begin, count = outputs
    return dest.view(images, tokens), members, begin.view(images, p.num_out()), count.view(images, p.num_out())


def emulated_best(emulator, metric, p, cu_seqlens=None, **options):
    """score, partner, rank of a (B, H, N, D) metric, or of a packed (T, D) one."""
    if cu_seqlens is None:
        images, problem = metric.shape[0], match_problem(metric, p)
    else:
        images = len(cu_seqlens) - 1
        sizes = images, 1, p.num_src + p.num_dst, metric.shape[1]
        problem = (0, 0, metric.stride(0), *sizes, DTYPES[metric.dtype], *map(int, p.numbers()))
    score = torch.full((images * p.num_src,), torch.nan)
    partner, rank = poisoned(images * p.num_src, images * p.num_src)
    buffers = [flat(metric), cu_seqlens, *lists_of(p), score, partner, rank]
    emulator.call("rank_candidates", problem, buffers, **options)
    return tuple(t.view(images, p.num_src) for t in (score, partner, rank))


def check_best(emulator, metric, p, cu_seqlens=None, **options):
    squeezed = metric[:, 0] if metric.dim() == 4 and metric.shape[1] == 1 else metric
    expected = rank_candidates.rank_candidates(squeezed, p, cu_seqlens)
    got = emulated_best(emulator, metric, p, cu_seqlens, **options)
    for name, ours, theirs in zip(("score", "partner", "rank"), got, expected, strict=True):
        assert ours.tolist() == theirs.tolist(), name


def check_match(emulator, metric, p, **options):
    squeezed = metric[:, 0] if metric.shape[1] == 1 else metric
    expected = bipartite_match.bipartite_match(squeezed, p)
    assert_map(emulated_match(emulator, metric, p, **options), expected, p.num_out())


def random_lists(images, tokens, num_src, r, first=0, by_index=False):
    order = torch.stack([torch.randperm(tokens) for _ in range(images)]).int()
    num_dst = tokens - num_src - first
    lists = (order[:, :num_src].contiguous(), order[:, num_src : num_src + num_dst].contiguous())
    return Partition(first, 2, num_src, num_dst, 0, 0, by_index, r, *lists)
