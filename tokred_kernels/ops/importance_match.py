# SPDX-License-Identifier: MIT
"""DiffRate's matching of unimportant tokens to important ones."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.checks import check_count, check_metric, prefix_length
from tokred_kernels.ops.autograd import constant
from tokred_kernels.ops.build_match_map import build_match_map
from tokred_kernels.ops.rank_candidates import rank_candidates
from tokred_kernels.partition import prefix_and_rest
from tokred_kernels.token_map import TokenMap

OP = "importance_match"


class ImportanceMatch(NamedTuple):
    """The result of `importance_match`.

    Attributes:
        token_map: the map from N to `num_kept` slots, the kept tokens by index.
        similarity: (B, N - num_kept) float32, the cosine of each other token with the kept token that it joins; -inf if
            it holds NaN.
    """

    token_map: TokenMap
    similarity: Tensor


def importance_match(
    metric: Tensor, num_kept: int, *, class_token: bool = False, num_prefix: int = 0
) -> ImportanceMatch:
    """Merge the least important tokens into the most similar important ones (DiffRate, section 3.2, `get_merge_func`).

    The tokens must be sorted by descending importance. Each token from index `num_kept` on joins the most similar of
    the first `num_kept` tokens; ties go to the lower index.

    Args:
        metric: (B, N, D), or keys (B, H, N, d), whose mean over heads is used. Not differentiated.
        num_kept: how many tokens stay; N or more is the identity.
        class_token: nothing joins token 0.
        num_prefix: nothing joins the first `num_prefix` tokens; give this or `class_token`.

    Returns:
        ImportanceMatch(token_map, similarity).

    Raises:
        TypeError: `metric` is not a floating-point tensor, or a count is not an int.
        ValueError: wrong rank, or `num_kept` leaves no token that others can join.
        RuntimeError: the backend requested by name cannot run the call.
    """
    check_metric(OP, metric)
    num_kept = check_count(OP, "num_kept", num_kept)
    prefix = prefix_length(OP, num_prefix, class_token, False)
    first = int(class_token) if prefix is None else prefix
    batch, tokens = metric.shape[0], metric.shape[-2]
    if num_kept >= tokens:
        identity = TokenMap.identity(batch, tokens, metric.device)
        return ImportanceMatch(identity, metric.new_empty((batch, 0)).float())
    if num_kept <= first:
        raise ValueError(
            f"tokred_kernels.{OP}: num_kept must be at least {first + 1}, for {tokens - num_kept} of {tokens} tokens "
            f"must join one that num_prefix or class_token does not protect, got {num_kept}"
        )
    metric = constant(metric)
    partition = prefix_and_rest(tokens, num_kept, first)
    backend = backends.choose("rank_candidates", metric)
    score, partner, rank = rank_candidates(metric, partition, backend)
    return ImportanceMatch(build_match_map(partner, rank, partition, tokens, backend), score)
