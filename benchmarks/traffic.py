# SPDX-License-Identifier: MIT
"""The least an op must do: bytes, each input read once and each output written once, and operations of its products.

Both are of what the op is defined to take and give, whoever computes it, so that providers share one yardstick.
"""

from __future__ import annotations

from benchmarks.cases import Case

INDEX = 4  # bytes of an int32
SIZE = 4  # bytes of a float32 size
ITEM = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


def slots(case: Case) -> int:
    """N', the number of output tokens."""
    tokens = case.shape[1]
    if case.op == "kth_bipartite_match":
        return tokens // case.r
    if case.op == "random_bipartite_match":
        return tokens - min(case.r, tokens - 1)
    return tokens - min(case.r, (tokens - 1) // 2)  # every other case protects the class token


def least_bytes(case: Case) -> int:
    """Bytes that must pass between memory and chip."""
    batch, tokens, channels = case.shape
    item, out = ITEM[case.dtype], slots(case)
    metric = batch * max(case.heads, 1) * tokens * case.metric_dim * item
    x, y = batch * tokens * channels * item, batch * out * channels * item
    dest, members, ranges = (INDEX * batch * count for count in (tokens, tokens, 2 * out))
    size_in, size_out = SIZE * batch * tokens, SIZE * batch * out

    if case.op.endswith("_match"):
        return metric + dest + members + ranges
    if case.op == "merge":
        forward, backward = x + members + ranges + y, y + dest + ranges + x
    elif case.op == "merge_wavg":
        forward = x + size_in + members + ranges + y + size_out
        backward = y + dest + size_in + size_out + x
    elif case.op == "unmerge":
        forward, backward = y + dest + x, x + members + ranges + y
    elif case.op == "bipartite_merge":  # the map is made on the way: written, and not read again by need
        return metric + x + size_in + dest + members + ranges + y + size_out
    elif case.op == "then":  # a map of N tokens into `out`, followed by one of `out` tokens
        return dest + INDEX * batch * out + dest
    else:
        return dest + members + ranges  # invert
    return forward + backward if case.training else forward


def operations(case: Case) -> int:
    """Floating-point operations of the similarity product; 0 for what only moves data."""
    if not (case.op.endswith("_match") or case.op == "bipartite_merge"):
        return 0
    batch, tokens, _ = case.shape
    if case.op == "kth_bipartite_match":
        destinations = tokens // case.r
        sources = destinations * (case.r - 1)
    elif case.op == "random_bipartite_match":
        sources, destinations = tokens - slots(case), slots(case)
    else:
        sources, destinations = (tokens + 1) // 2, tokens // 2
    return 2 * batch * sources * destinations * case.metric_dim
