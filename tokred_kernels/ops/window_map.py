# SPDX-License-Identifier: MIT
"""Build the token map that merges the most similar windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.reference import window_map as reference
from tokred_kernels.backends.registration import register
from tokred_kernels.ops.counts import packing_after
from tokred_kernels.token_map import TokenMap
from tokred_kernels.windows import RULES, SCHEMA, Windows


def window_map(score: Tensor, windows: Windows, r: int, backend: str, counts: Tensor | None = None) -> TokenMap:
    """Return the map that merges the `r` windows of highest `score` (B, W) float32; ties go to the lower index.

    With `counts` (B,) int32, image b merges `counts[b]` windows instead, and the map is packed; `counts` is read back
    to the host once. The slots are the leading tokens, the merged windows by descending score, and all other tokens by
    index.
    """
    removed = windows.size() - 1
    packed = None
    if counts is not None:
        packed = packing_after((windows.num_tokens(),) * score.shape[0], counts, each=removed)
    starts_out = None if packed is None else packed.cu_seqlens
    num_out = windows.num_tokens() - r * removed if packed is None else packed.rows
    if backend != "reference":
        backend = backends.companion("window_map", backend, score)
    if backend == "reference" and packed is None:  # a selector that is exported computes only `dest`
        return TokenMap._trusted(reference.window_dest(score, windows, r), num_out)
    if backend == "reference":
        views = reference.window_map(score, windows, r, counts, starts_out, num_out)
    else:
        views = _window_map(score, *windows, r, counts, starts_out, num_out, backend)
    return TokenMap._trusted(views[0], num_out, *views[1:], packed)


def _implementation(score: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *windows, r, counts, starts_out, num_out, backend = others
    return backends.implementation(backend, "window_map")(score, Windows(*windows), r, counts, starts_out, num_out)


def _fake(score: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *numbers, _, counts, _, num_out, _ = others
    images, tokens = score.shape[0], Windows(*numbers).num_tokens()
    slots = (images, num_out) if counts is None else (num_out,)
    return (
        score.new_empty((images, tokens), dtype=torch.int32),
        score.new_empty(images * tokens, dtype=torch.int32),
        score.new_empty(slots, dtype=torch.int32),
        score.new_empty(slots, dtype=torch.int32),
    )


_window_map = register(
    f"window_map(Tensor score, {SCHEMA}, SymInt r, Tensor? counts, Tensor? starts_out, SymInt num_out, str backend) "
    "-> (Tensor dest, Tensor members, Tensor begin, Tensor count)",
    _fake,
    {
        "score": "float32 (B, W)",
        "N": "first + grid_height * grid_width",
        **RULES,
        "width": RULES["width"] + " and W == (grid_height // height) * (grid_width // width)",
        "r": "0 <= r <= W and (counts is None) == (starts_out is None)",
        "counts": "int32 (B,); entries(counts, 0, W + 1)",
        "starts_out": "int32 (B + 1,); follows(starts_out, N - (height * width - 1) * counts, num_out)",
        "num_out": "B * N <= ROWS and (counts is not None or num_out == N - r * (height * width - 1))",
    },
    _implementation,
)
