# SPDX-License-Identifier: MIT
"""ToMe in one call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tokred_kernels.checks import check_same_device, check_tokens, shape
from tokred_kernels.ops.bipartite_match import bipartite_match
from tokred_kernels.ops.merge_wavg import merge_wavg
from tokred_kernels.token_map import TokenMap


class MergeOutput(NamedTuple):
    """What a merge gives: tokens `x` (B, N', C), their float32 `size` (B, N', 1), and the `token_map` it followed."""

    x: Tensor
    size: Tensor
    token_map: TokenMap


def bipartite_merge(
    x: Tensor,
    r: int,
    *,
    metric: Tensor | None = None,
    size: Tensor | None = None,
    class_token: bool = False,
    distill_token: bool = False,
    num_prefix: int | None = None,
) -> MergeOutput:
    """Merge the `r` most similar pairs of tokens by size-weighted average (ToMe, section 3.1): match, then merge_wavg.

    Args:
        x: (B, N, C).
        r: how many tokens to remove, at most half of the unprotected ones: more is cut to that.
        metric: (B, N, D), or keys (B, H, N, d), to compare tokens by; default `x` itself. Not differentiated.
        size: (B, N, 1) or (B, N), how many first tokens each token stands for; None for 1 each.
        class_token, distill_token, num_prefix: what is protected, as in `bipartite_match`.

    Returns:
        MergeOutput(x (B, N', C), size (B, N', 1), token_map).

    Differentiable once in `x` and `size`. Raises as `bipartite_match` and `merge_wavg` do, and ValueError where the
    metric's B, N or device are not x's. Two kernel launches on a GPU.
    """
    if metric is None:
        metric = x
    check_tokens("bipartite_merge", "x", x)
    token_map = bipartite_match(metric, r, class_token=class_token, distill_token=distill_token, num_prefix=num_prefix)
    if metric is not x:
        if token_map.dest.shape != x.shape[:2]:
            raise ValueError(
                f"tokred_kernels.bipartite_merge: metric must have x's B and N: metric is {shape(metric)}, "
                f"x is {shape(x)}"
            )
        check_same_device("bipartite_merge", "metric", metric, "x", x)
    merged, merged_size = merge_wavg(x, token_map, size)
    return MergeOutput(merged, merged_size, token_map)
