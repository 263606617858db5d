# SPDX-License-Identifier: MIT
"""The least an op must do: bytes, each input read once and each output written once, and operations of its products.

Both are of what the op is defined to take and give, whoever computes it, so that providers share one yardstick. A
merge of windows reads its input twice: which windows merge is known only when all have been seen.
"""

from __future__ import annotations

from benchmarks.cases import WINDOW_OPS, Case
from benchmarks.families import family

INDEX = 4  # bytes of an int32
SIZE = 4  # bytes of a float32 size, or similarity
ITEM = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


def slots(case: Case) -> int:
    """N', the number of output tokens."""
    tokens = case.shape[1]
    if case.op == "kth_bipartite_match":
        return tokens // case.r
    if case.op == "random_bipartite_match":
        return tokens - min(case.r, tokens - 1)
    if case.op in WINDOW_OPS:
        return tokens - case.r * (case.window[0] * case.window[1] - 1)
    if case.op == "grid_bipartite_match":
        return tokens - min(case.r, tokens - cells(case))
    if case.op == "importance_match":
        return tokens - case.r
    return tokens - min(case.r, (tokens - 1) // 2)  # every other case protects the class token


def cells(case: Case) -> int:
    """Destinations of a grid: one in each cell."""
    (height, width), (down, across) = case.grid, case.window
    return (height // down) * (width // across)


def least_bytes(case: Case) -> int:
    """Bytes that must pass between memory and chip."""
    own = family(case)
    if own is not None:
        return own.least_bytes(case)
    batch, tokens, channels = case.shape
    item, out = ITEM[case.dtype], slots(case)
    metric = batch * max(case.heads, 1) * tokens * case.metric_dim * item
    x, y = batch * tokens * channels * item, batch * out * channels * item
    dest, members, ranges = (INDEX * batch * count for count in (tokens, tokens, 2 * out))
    size_in, size_out = SIZE * batch * tokens, SIZE * batch * out
    views = dest + members + ranges

    if case.op == "window_match":
        return x + views
    if case.op == "window_merge":
        return 2 * x + views + y + size_out
    if case.op == "importance_match":  # with the similarities of those that joined
        return metric + views + SIZE * batch * case.r
    if case.op.endswith("_match"):
        return metric + views
    if case.op == "merge":
        forward, backward = x + members + ranges + y, y + dest + ranges + x
    elif case.op == "merge_wavg":
        forward = x + size_in + members + ranges + y + size_out
        backward = y + dest + size_in + size_out + x
    elif case.op == "unmerge":
        forward, backward = y + dest + x, x + members + ranges + y
    elif case.op == "bipartite_merge":  # the map is made on the way: written, and not read again by need
        return metric + x + size_in + views + y + size_out
    elif case.op == "then":  # a map of N tokens into `out`, followed by one of `out` tokens
        return dest + INDEX * batch * out + dest
    else:
        return views  # to_csr
    return forward + backward if case.training else forward


def operations(case: Case) -> int:
    """Floating-point operations of the similarity product; 0 for what only moves data, or only sums it."""
    own = family(case)
    if own is not None:
        return own.operations(case)
    if not (case.op.endswith("_match") or case.op == "bipartite_merge") or case.op in WINDOW_OPS:
        return 0
    batch, tokens, _ = case.shape
    if case.op == "kth_bipartite_match":
        destinations = tokens // case.r
        sources = destinations * (case.r - 1)
    elif case.op in ("random_bipartite_match", "importance_match"):
        sources, destinations = tokens - slots(case), slots(case)
    elif case.op == "grid_bipartite_match":
        sources, destinations = tokens - cells(case), cells(case)
    else:
        sources, destinations = (tokens + 1) // 2, tokens // 2
    return 2 * batch * sources * destinations * case.metric_dim
