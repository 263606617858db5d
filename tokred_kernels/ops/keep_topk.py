# SPDX-License-Identifier: MIT
"""Keep the most important tokens: pruning as a token map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.reference import keep_topk as reference
from tokred_kernels.backends.registration import register
from tokred_kernels.checks import MAX_ROWS, check_count, check_flag, check_floating, has_too_many, shape
from tokred_kernels.token_map import TokenMap

OP = "keep_topk"


def keep_topk(scores: Tensor, k: int, *, num_prefix: int = 0, fuse: bool = False) -> TokenMap:
    """Keep the prefix and the `k` tokens of highest score; drop the others, or fuse them into one.

    (DynamicViT, section 3.2; EViT, section 3.2; DiffRate, section 3.1.)

    The slots are the prefix, the kept tokens by descending score (ties go to the lower index, and NaN comes last), and,
    with `fuse`, one slot for all other tokens. For EViT's fused token, call `merge` with reduce="sum" and a weight of 1
    for each kept token and its score for each other token.

    Args:
        scores: (B, N), such as the importance from `token_attention`. Compared as float32. The scores of the prefix are
            not used. Not differentiated.
        k: how many tokens to keep after the prefix.
        num_prefix: the number of leading tokens that always stay, in place.
        fuse: send the other tokens to one last slot. The slot is left out if all tokens are kept.

    Returns:
        A TokenMap from N to num_prefix + k slots, one more with `fuse`.

    Raises:
        TypeError: `scores` is not a floating-point tensor, or a count is not an int.
        ValueError: wrong rank, or `k` above N - num_prefix.
        RuntimeError: the backend requested by name cannot run the call.
    """
    k, num_prefix = _check(scores, k, num_prefix, fuse)
    tokens = scores.shape[1]
    fuse = fuse and num_prefix + k < tokens
    scores = scores.detach()
    if scores.dtype != torch.float32:
        scores = scores.float()
    backend = backends.choose(OP, scores)
    num_out = num_prefix + k + int(fuse)
    if backend == "reference":
        return TokenMap._trusted(reference.keep_topk(scores, k, num_prefix, fuse), num_out)
    views = _keep_topk(scores, k, num_prefix, fuse, backend)
    return TokenMap._trusted(views[0], num_out, *views[1:])


def _check(scores: Any, k: Any, num_prefix: Any, fuse: Any) -> tuple[int, int]:
    check_floating(OP, "scores", scores)
    if scores.dim() != 2:
        raise ValueError(f"tokred_kernels.{OP}: scores must be (B, N), got shape {shape(scores)}")
    if has_too_many(scores.numel()):
        raise ValueError(f"tokred_kernels.{OP}: scores may have at most {MAX_ROWS} entries, got shape {shape(scores)}")
    k, num_prefix = check_count(OP, "k", k), check_count(OP, "num_prefix", num_prefix)
    check_flag(OP, "fuse", fuse)
    tokens = scores.shape[1]
    if num_prefix > tokens:
        raise ValueError(f"tokred_kernels.{OP}: num_prefix must be at most N = {tokens}, got {num_prefix}")
    if k > tokens - num_prefix:
        raise ValueError(
            f"tokred_kernels.{OP}: k must be at most N - num_prefix = {tokens} - {num_prefix} = {tokens - num_prefix}, "
            f"got {k}"
        )
    return k, num_prefix


def _fake(scores: Tensor, k: int, first: int, fuse: bool, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens = scores.shape
    slots = (batch, first + k + int(fuse))
    return (
        scores.new_empty((batch, tokens), dtype=torch.int32),
        scores.new_empty(batch * tokens, dtype=torch.int32),
        scores.new_empty(slots, dtype=torch.int32),
        scores.new_empty(slots, dtype=torch.int32),
    )


_keep_topk = register(
    "keep_topk(Tensor scores, SymInt k, SymInt first, bool fuse, str backend) "
    "-> (Tensor dest, Tensor members, Tensor begin, Tensor count)",
    _fake,
    {"scores": "float32 (B, N); B * N <= ROWS", "first": "0 <= first <= N", "k": "0 <= k <= N - first"},
)
