# SPDX-License-Identifier: MIT
"""Count the floating-point operations of a vision transformer, block by block, as its tokens are reduced.

A multiply-add is two operations. Papers on vision transformers mostly call one multiply-add one FLOP: that number is
`Flops.macs`. `tokred_kernels.nn.flops` describes what is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tokred_kernels.checks import check_count
from tokred_kernels.models import base
from tokred_kernels.models.reducer import reducer_of
from tokred_kernels.models.spec import TRACE, BlockSpec, ModelSpec
from tokred_kernels.nn.flops import Flops, counter, linear_flops

__all__ = ["Flops", "count", "counter", "image_size", "linear_flops"]


def count(
    model: nn.Module,
    img_size: int | tuple[int, int] | None = None,
    *,
    tokens: Sequence[int] | None = None,
) -> Flops:
    """Count the FLOPs of a vision transformer for one image, patched or not, from its shapes alone.

    Args:
        model: a timm or transformers model that `patch` supports; a two-tower model counts without its text tower.
        img_size: pixels, (height, width) or one number for both; default the model's own size.
        tokens: how many tokens leave each block. Default: what the method's settings imply, or all tokens for an
            unpatched model. If the images decide, the counts of the last forward, averaged over its images.

    Raises:
        TypeError, ValueError: a wrong `img_size` or `tokens`.
        RuntimeError: the images decide the counts, and there was no forward with this image size.
        NotImplementedError: an unsupported model.
        ImportError: the model's library is too old.
    """
    _check_module("count", model)
    given = None if img_size is None else _pixels(img_size)
    if tokens is not None:
        if not isinstance(tokens, Sequence) or isinstance(tokens, str):
            raise TypeError(f"tokred_kernels.flops.count: tokens must be a list of ints, got {type(tokens).__name__}")
        tokens = [check_count("flops.count", "tokens", number) for number in tokens]
    spec = base.model_spec(model)
    return _count(model, spec, image_size(model) if given is None else given, tokens)


def image_size(model: Any) -> tuple[int, int]:
    """Return the (height, width) of the images that a model was made for."""
    _check_module("image_size", model)
    return base.costs_of(model).image_size(model)


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"tokred_kernels.flops.{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _pixels(img_size: int | tuple[int, int]) -> tuple[int, int]:
    size = (img_size, img_size) if not isinstance(img_size, (tuple, list)) else tuple(img_size)
    if len(size) != 2:
        raise ValueError(f"tokred_kernels.flops.count: img_size must be one number or (height, width), got {img_size}")
    height, width = size
    return check_count("flops.count", "img_size", height, 1), check_count("flops.count", "img_size", width, 1)


def _count(model: Any, spec: ModelSpec, pixels: tuple[int, int], given: Sequence[int] | None) -> Flops:
    costs = base.costs_of(model)
    grid = costs.grid(model, pixels)
    entering = grid[0] * grid[1] + spec.num_prefix
    images = _tokens_of_images(spec, entering, grid, given)
    per_block = []
    for index, (block, block_spec) in enumerate(zip(spec.blocks, spec.block_specs, strict=True)):
        # The tokens that enter a block left the block before it.
        numbers = [(image[index - 1][1] if index else entering, *image[index]) for image in images]
        per_block.append(round(_mean([_block_flops(block, block_spec, *image) for image in numbers])))
    head = round(_mean([costs.head(model, image[-1][1]) for image in images]))
    left = [[entering, *(after for _, after in image)] for image in images]
    embed = costs.patch_embed(model, pixels, grid)
    return Flops(tuple(per_block), embed, head, tuple(_mean(column) for column in zip(*left, strict=True)))


def _tokens_of_images(
    spec: ModelSpec, entering: int, grid: tuple[int, int], given: Sequence[int] | None
) -> list[list[tuple[int, int]]]:
    """Return, for each image or once for all, the tokens that attend in each block and that leave it."""
    depth = len(spec.blocks)
    if given is not None:
        if len(given) != depth:
            raise ValueError(
                f"tokred_kernels.flops.count: tokens must have one number for each of {depth} blocks, got {len(given)}"
            )
        return [list(zip((entering, *given), given))]  # noqa: B905  (no block follows the last number)
    counts, tokens = [], entering
    for block in spec.blocks:
        reducer = reducer_of(block)
        attended = reducer.tokens_attended(tokens, grid)
        after = None if attended is None else reducer.tokens_after(attended, grid)
        if attended is None or after is None:
            return _traced_tokens(spec.model, entering)
        counts.append((attended, after))
        tokens = after
    return [counts]


def _traced_tokens(model: Any, entering: int) -> list[list[tuple[int, int]]]:
    """Return the counts of `_tokens_of_images` for the images of the last forward."""
    trace = getattr(model, TRACE)
    batch, tokens = trace.entered[:2] if trace.entered is not None else (0, 0)
    if batch == 0 or tokens != entering:
        found = f"the last one had images of {tokens}" if batch else "there was none"
        raise RuntimeError(
            "tokred_kernels.flops.count: the images decide how many tokens merge: first run a forward with images of "
            f"{entering} tokens ({found}), or give tokens="
        )
    columns = [[(n,) * batch if isinstance(n, int) else n for n in pair] for pair in trace.counts]
    return [[(attended[i], left[i]) for attended, left in columns] for i in range(batch)]


def _mean(values: Sequence[int]) -> float:
    """Return the mean, as an int if it is a whole number."""
    whole, rest = divmod(sum(values), len(values))
    return whole if rest == 0 else sum(values) / len(values)


def _block_flops(block: Any, spec: BlockSpec, entering: int, attended: int, after: int) -> int:
    selection = reducer_of(block).selection_flops(entering, attended, spec)
    # Projections, and two products of (N, d) with (N, d) in each head.
    attention = attended * linear_flops(spec.attention) + 4 * attended * attended * spec.inner_dim
    return selection + attention + after * linear_flops(spec.mlp)
