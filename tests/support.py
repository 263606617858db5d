# SPDX-License-Identifier: MIT
"""What tests share: how close is close enough, and when a match is right although another is just as good."""

import json
from pathlib import Path

import numpy as np
import torch

from tokred_kernels.backends.reference import bipartite_match as reference
from tokred_kernels.partition import every_other

GOLDEN = Path(__file__).parent / "golden"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Cosines of unit vectors in float32 differ by a few roundings a channel between orders of summation.
COSINE_BAND = 4e-6


def golden(name):
    """The recorded arrays as tensors, and the parameters they were recorded with."""
    entry = next(e for e in json.loads((GOLDEN / "manifest.json").read_text()) if e["file"] == name)
    with np.load(GOLDEN / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}, entry["params"]


def assert_sum_close(actual, exact, terms, magnitude=None):
    """`actual` is `exact` (float64) up to rounding: once to its dtype, and `terms` times in float32 on the way."""
    rounding = torch.finfo(actual.dtype).eps
    single = 0.0 if actual.dtype == torch.float64 else torch.finfo(torch.float32).eps * (terms + 2)
    magnitude = exact.abs() if magnitude is None else magnitude
    bound = rounding * exact.abs() + (single + rounding * 2 ** (-8)) * magnitude + torch.finfo(actual.dtype).tiny
    if actual.dtype == torch.float64:
        bound = bound + rounding * (terms + 2) * magnitude
    worst = ((actual.double() - exact).abs() - bound).max() if exact.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"off by {worst:.3g} more than rounding explains"


def assert_valid_match(token_map, metric, r, *, prefix=None, class_token=False, distill_token=False):
    """The map is what float64 cosines say, or differs from it only where they tie to within `COSINE_BAND`."""
    metric = metric.cpu()
    partition = every_other(metric.shape[-2], r, prefix, class_token, distill_token)
    dest = token_map.dest.cpu().long()
    if partition is None:
        assert torch.equal(dest, torch.arange(metric.shape[-2]).expand_as(dest))
        return
    assert token_map.num_out == partition.num_out
    best, index = reference.best_destination(metric, partition, torch.float64)
    if torch.equal(reference.build_dest(best, index, metric.shape[-2], partition), dest.int()):
        return
    source, destination = reference.tokens(partition, metric.shape[0], metric.device)
    rounded = metric.double().mean(1).to(metric.dtype) if metric.dim() == 4 else metric
    unit = rounded.double() * reference.inverse_norm(rounded.double())
    for image in range(dest.shape[0]):
        slot_of_destination = dest[image, destination[image]]
        assert slot_of_destination.unique().numel() == partition.num_dst
        where = torch.full((partition.num_out,), -1)
        where[slot_of_destination] = destination[image]
        target = where[dest[image, source[image]]]  # the destination token each source shares a slot with, or -1
        joined = target >= 0
        assert int(joined.sum()) == partition.r
        assert not joined[: partition.protected_src].any()
        score = (unit[image, source[image][joined]] * unit[image, target[joined]]).sum(-1)
        band = COSINE_BAND if metric.dim() == 3 else head_band(metric.dtype)
        assert (score >= best[image][joined] - band).all(), "joined a destination that is not the most similar"
        free = ~joined
        free[: partition.protected_src] = False
        if free.any():
            assert best[image][joined].min() >= best[image][free].max() - band, "joined none of the r best"
            slots = dest[image, source[image][free]]
            order = best[image][free][slots.argsort()]
            if partition.sources_by_index:
                assert (slots.diff() > 0).all()
            else:
                assert (order.diff() <= band).all(), "unmerged sources are not in descending order"


def head_band(dtype):
    """The mean over heads is rounded to the metric's dtype: a last-place flip there moves a cosine by about that."""
    return COSINE_BAND + torch.finfo(dtype).eps


def random_map(batch, tokens, num_out, *, dropped=0.0, device="cpu"):
    """A map with random slots, some of them empty, and a share of its tokens dropped."""
    from tokred_kernels import TokenMap

    dest = torch.randint(0, max(num_out, 1), (batch, tokens))
    dest[torch.rand(batch, tokens) < dropped] = -1
    if num_out == 0:
        dest.fill_(-1)
    return TokenMap.from_dest(dest.to(device), num_out)
