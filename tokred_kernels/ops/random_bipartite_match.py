# SPDX-License-Identifier: MIT
"""ToMe's random bipartite matching."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.checks import check_count, check_generator, check_metric
from tokred_kernels.ops.bipartite_match import match
from tokred_kernels.partition import Partition
from tokred_kernels.token_map import TokenMap


def random_bipartite_match(
    metric: Tensor, r: int, *, num_prefix: int = 0, generator: torch.Generator | None = None
) -> TokenMap:
    """Merge `r` random tokens into the most similar of the others (ToMe, appendix D, `random_bipartite_soft_matching`).

    Args:
        metric: (B, N, D), or keys (B, H, N, d), whose mean over heads is used. Not differentiated.
        r: how many tokens to remove, capped at one fewer than the unprotected tokens. 0 is the identity.
        num_prefix: the number of leading tokens that are never drawn. They come first in the output, in order.
        generator: on the metric's device; default torch's own.

    Returns:
        A TokenMap from N to N - r slots: the prefix, then the destinations in random order, drawn for each image.

    Raises:
        TypeError: `metric` is not a floating-point tensor, or `r` is not an int.
        ValueError: wrong rank, `r < 0`, or more prefix tokens than tokens.
    """
    op = "random_bipartite_match"
    check_metric(op, metric)
    r = check_count(op, "r", r)
    num_prefix = check_count(op, "num_prefix", num_prefix)
    check_generator(op, generator)
    batch, tokens = metric.shape[0], metric.shape[-2]
    free = tokens - num_prefix
    if free < 0:
        raise ValueError(f"tokred_kernels.{op}: num_prefix must be at most N = {tokens}, got {num_prefix}")
    r = min(r, free - 1)
    if r <= 0:
        return match(metric, None)
    draw = torch.rand(batch, free, device=metric.device, generator=generator)
    order = (draw.argsort(dim=1) + num_prefix).int()
    sources, destinations = order[:, :r].contiguous(), order[:, r:].contiguous()
    return match(metric, Partition(num_prefix, 1, r, free - r, 0, 0, False, r, sources, destinations))
