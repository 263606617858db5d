# SPDX-License-Identifier: MIT
"""What a model costs with the token counts that DiffRate has learned so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred_kernels import flops
from tokred_kernels.models.base import model_spec
from tokred_kernels.nn.flops import linear_flops


def kept_counts(model: Any) -> tuple[list[int], list[int]]:
    """Return how many tokens each block keeps after pruning, and after merging, with the current learned counts.

    Args:
        model: a model patched with DiffRate and without given counts.
    """
    counts = [
        torch.stack([block.prune_ddp.kept(), block.merge_ddp.kept()]).tolist() for block in model_spec(model).blocks
    ]
    return [int(prune) for prune, _ in counts], [int(merge) for _, merge in counts]


def compression_flops(model: Any) -> Tensor:
    """Return the GFLOPs for one image with the current learned counts, a scalar differentiable in these.

    The value equals `flops.count(model).gflops`, where a multiply-add is two operations (papers on vision transformers
    print half of it). The gradient is the published one: the tokens that leave a block are the minimum of those that
    enter and the two counts; the gradient of this minimum goes to both counts, and the cost of matching has none.

    Args:
        model: a model patched with DiffRate and without given counts.
    """
    spec = model_spec(model)
    tokens: Any = spec.num_patches + spec.num_prefix  # type: ignore[operator]
    entering: Any = tokens
    slope: Any = 0.0
    left = []
    for block, block_spec in zip(spec.blocks, spec.block_specs, strict=True):
        prune, merge = block.prune_ddp.kept(), block.merge_ddp.kept()
        tokens = min(tokens, int(prune.detach()), int(merge.detach()))
        leaving = tokens + _gradient_only(prune) + _gradient_only(merge)
        slope = slope + 1e-9 * linear_flops(block_spec.attention) * entering
        slope = (
            slope + 4e-9 * block_spec.inner_dim * entering * entering + 1e-9 * linear_flops(block_spec.mlp) * leaving
        )
        left.append(tokens)
        entering = leaving
    return flops.count(model, tokens=left).gflops + _gradient_only(slope)


def _gradient_only(value: Tensor) -> Tensor:
    """Return zero with the gradient of `value`."""
    return value - value.detach()
