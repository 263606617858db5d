# SPDX-License-Identifier: MIT
"""ToMe's k-th bipartite matching."""

from __future__ import annotations

from torch import Tensor

from tokred_kernels.checks import check_count, check_metric
from tokred_kernels.ops.bipartite_match import match
from tokred_kernels.partition import every_kth
from tokred_kernels.token_map import TokenMap


def kth_bipartite_match(metric: Tensor, k: int, *, num_prefix: int = 0) -> TokenMap:
    """Merge every token into the most similar of every k-th token (ToMe, appendix D, `kth_bipartite_soft_matching`).

    The last token of each group of `k` is a destination, the others are sources, and every source joins the destination
    most similar to it. Tokens after the last whole group are dropped.

    Args:
        metric: (B, N, D), or keys (B, H, N, d), whose mean over heads is used. Not differentiated.
        k: the group size, at least 1; 1 is the identity.
        num_prefix: the number of leading tokens that are in no group. They come first in the output.

    Returns:
        A TokenMap from N to num_prefix + (N - num_prefix) // k slots, the destinations by index.

    Raises:
        TypeError: `metric` is not a floating-point tensor, or `k` is not an int.
        ValueError: wrong rank, `k < 1`, or more prefix tokens than tokens.
    """
    op = "kth_bipartite_match"
    check_metric(op, metric)
    k = check_count(op, "k", k, least=1)
    num_prefix = check_count(op, "num_prefix", num_prefix)
    tokens = metric.shape[-2]
    if num_prefix > tokens:
        raise ValueError(f"tokred_kernels.{op}: num_prefix must be at most N = {tokens}, got {num_prefix}")
    return match(metric, None if k == 1 else every_kth(tokens, k, num_prefix))
