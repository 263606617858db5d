# SPDX-License-Identifier: MIT
"""EViT's parts: the fusion of inattentive tokens, and the schedule of the keep rate."""

from __future__ import annotations

import math

from torch import Tensor

from tokred_kernels.checks import check_floating, check_real, check_same_device, check_tokens, shape
from tokred_kernels.ops.keep_topk import keep_topk
from tokred_kernels.ops.merge import merge
from tokred_kernels.token_map import TokenMap


def keep_attentive(
    x: Tensor, importance: Tensor, k: int, *, num_prefix: int = 1, fuse: bool = True
) -> tuple[Tensor, TokenMap]:
    """Keep the `k` most attended tokens, and fuse the others into one (EViT, section 3.2).

    Args:
        x: (B, N, C).
        importance: (B, N), the attention of the class token, from `token_attention(importance="class")`. The fused
            token is the sum of its tokens times their importance, and differentiable in both.
        k, num_prefix, fuse: see `keep_topk`; without `fuse`, the other tokens are dropped.

    Returns:
        The output tokens, and the map.

    Raises:
        TypeError, ValueError: see `keep_topk` and `merge`.
    """
    op = "nn.keep_attentive"
    check_tokens(op, "x", x)
    check_floating(op, "importance", importance)
    if importance.shape != x.shape[:2]:
        raise ValueError(
            f"tokred_kernels.{op}: importance must be {shape(x)[:2]} as x is {shape(x)}, got {shape(importance)}"
        )
    check_same_device(op, "importance", importance, "x", x)
    token_map = keep_topk(importance, k, num_prefix=num_prefix, fuse=fuse)
    if token_map.num_out == num_prefix + k:
        return merge(x, token_map, reduce="sum"), token_map
    weight = importance.masked_fill(token_map.dest != num_prefix + k, 1.0)
    return merge(x, token_map, reduce="sum", weight=weight), token_map


def cosine_keep_rate(step: int, *, warmup: int, total: int, base: float, highest: float = 1.0) -> float:
    """Return the keep rate at a training step: 1 at first, then falling to `base` along a cosine (EViT, section 4).

    Args:
        step: the step, counted from 0, in iterations or epochs.
        warmup: the number of first steps that keep every token.
        total: from this step on, the rate is `base`. With warmup = total = 0, as in the published fine-tuning, it is
            always `base`.
        base: the last rate.
        highest: the rate at which the cosine starts.

    Raises:
        ValueError: rates that are not 0 < base <= highest <= 1, a negative `step`, or `warmup` above `total`.
    """
    for name, value in {"step": step, "warmup": warmup, "total": total, "base": base, "highest": highest}.items():
        check_real("nn.cosine_keep_rate", name, value, infinite=True)
    if not 0 < base <= highest <= 1:
        raise ValueError(
            "tokred_kernels.nn.cosine_keep_rate: base and highest must be 0 < base <= highest <= 1, "
            f"got {base} and {highest}"
        )
    if not 0 <= warmup <= total:
        raise ValueError(
            f"tokred_kernels.nn.cosine_keep_rate: warmup must be from 0 to total, got {warmup} and {total}"
        )
    if not step >= 0:
        raise ValueError(f"tokred_kernels.nn.cosine_keep_rate: step must be at least 0, got {step}")
    if step < warmup:
        return 1.0
    if step >= total:
        return base
    return base + (highest - base) * (math.cos(math.pi * (step - warmup) / (total - warmup)) + 1) / 2
