# SPDX-License-Identifier: MIT
"""ALGM's local matching: merge windows of similar tokens."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.checks import MAX_ROWS, check_choice, check_count, check_tokens, has_too_many, shape, shown
from tokred_kernels.ops.autograd import constant
from tokred_kernels.ops.counts import BATCH, IMAGE, check_count_mode, check_readable, check_threshold, smallest
from tokred_kernels.ops.window_map import window_map
from tokred_kernels.ops.window_similarity import window_similarity
from tokred_kernels.token_map import TokenMap
from tokred_kernels.windows import Windows

OP = "window_match"
KEEP, REFUSE = "keep", "refuse"


def window_match(
    x: Tensor,
    threshold: float | None = None,
    *,
    window: tuple[int, int] = (2, 2),
    grid: tuple[int, int] | None = None,
    num_prefix: int = 0,
    count: int | str = BATCH,
    uneven: str = KEEP,
    group: Any = None,
) -> TokenMap:
    """Merge windows of a grid whose tokens are similar (ALGM, section 3.2: conditional local average pooling, CLAP).

    A window's similarity is the mean cosine, in float32, of its pairs of different tokens. Each window at or above the
    threshold merges into one token. The slots are the leading tokens, the merged windows by descending similarity (ties
    go to the lower index), then all other tokens by index.

    Args:
        x: (B, N, C): `num_prefix` leading tokens, then a grid row by row. Not differentiated.
        threshold: a cosine. Not needed, and not used, if `count` is an int.
        window: height and width in tokens, at least two tokens.
        grid: height and width in tokens; default: a square.
        num_prefix: the number of leading tokens (class, distillation, registers). They are in no window and stay first.
        count: how many windows merge. "batch", as in ALGM: each image merges as many windows as the image of the batch
            with the fewest that reach the threshold, so that the output is rectangular; the most similar windows of
            each image merge. "image": each image merges all windows that reach the threshold, as if it were alone in
            the batch, and the map is packed. An int: that many in each image, capped at all windows.
        uneven: for a grid that the window does not divide: "keep" leaves the rest at its right and bottom unmerged,
            "refuse" raises.
        group: with count="batch", a torch.distributed process group that shares the smallest count, so that all its
            processes have equal shapes. None for this process alone.

    Returns:
        A TokenMap from N to N - count (kh kw - 1) slots; packed for count="image".

    "batch" and "image" read the B counts back to the host. An int reads nothing: use it in CUDA graphs and
    torch.compile. Reads x once for any window size, and never stores the similarities of pairs.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a threshold that is NaN; a grid whose product is not N - num_prefix; a window of one token, larger
            than the grid or, with uneven="refuse", not dividing it; an unknown `count` or `uneven`; or a group without
            count="batch".
        RuntimeError: the backend requested by name cannot run the call.
    """
    windows = _check(x, window, grid, num_prefix, uneven)
    count = check_count_mode(OP, count, group)
    if isinstance(count, str):
        threshold = check_threshold(OP, threshold)
        check_readable(OP, "x", x)
    else:
        threshold = 0.0 if threshold is None else check_threshold(OP, threshold)
    x = constant(x)
    backend = backends.choose("window_similarity", x)
    score, counts = window_similarity(x, windows, threshold, backend)
    if not isinstance(count, str):
        return window_map(score, windows, min(count, windows.number()), backend)
    if count == IMAGE:
        return window_map(score, windows, 0, backend, counts)
    return window_map(score, windows, smallest(counts, group), backend)


def _check(x: Any, window: Any, grid: Any, num_prefix: Any, uneven: Any) -> Windows:
    check_tokens(OP, "x", x)
    batch, tokens, _ = shape(x)
    if has_too_many(batch * tokens):
        raise ValueError(f"tokred_kernels.{OP}: x may have at most {MAX_ROWS} tokens in all, got shape {shape(x)}")
    num_prefix = check_count(OP, "num_prefix", num_prefix)
    height, width = check_pair(OP, "window", window)
    down, across = square(OP, tokens, num_prefix) if grid is None else check_pair(OP, "grid", grid)
    if down * across != tokens - num_prefix:
        raise ValueError(
            f"tokred_kernels.{OP}: grid must hold N - num_prefix = {tokens} - {num_prefix} tokens, got "
            f"{(down, across)}, which holds {down * across}"
        )
    if height * width < 2:
        raise ValueError(f"tokred_kernels.{OP}: window must hold at least 2 tokens, got {(height, width)}")
    if height > down or width > across:
        raise ValueError(f"tokred_kernels.{OP}: window must fit into the grid {(down, across)}, got {(height, width)}")
    check_choice(OP, "uneven", uneven, (KEEP, REFUSE))
    if uneven == REFUSE and (down % height or across % width):
        raise ValueError(
            f"tokred_kernels.{OP}: window must divide the grid {(down, across)}, got {(height, width)}; "
            'uneven="keep" leaves the rest of the grid unmerged'
        )
    return Windows(num_prefix, down, across, height, width)


def check_pair(op: str, name: str, value: Any, least: int = 1) -> tuple[int, int]:
    """Return `value` as a pair of ints of at least `least`; raise unless it is such a pair."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"tokred_kernels.{op}: {name} must be a pair (height, width), got {shown(value)}")
    height, width = value
    return check_count(op, f"{name} height", height, least), check_count(op, f"{name} width", width, least)


def square(op: str, tokens: int, num_prefix: int) -> tuple[int, int]:
    """Return the square grid that follows the prefix; raise ValueError if the number of tokens is not a square."""
    patches = tokens - num_prefix
    side = math.isqrt(max(patches, 0))
    if patches < 1 or side * side != patches:
        raise ValueError(
            f"tokred_kernels.{op}: grid must be given if N - num_prefix = {tokens} - {num_prefix} is not a square "
            "number"
        )
    return side, side
