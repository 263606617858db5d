# SPDX-License-Identifier: MIT
"""How many floating-point operations a vision transformer takes, block by block, as its tokens get fewer.

Counted as torch.utils.flop_counter counts: matrix products, convolutions and attention, a multiply-add being two
operations; not norms, activations, softmax, nor the moving of tokens. Papers on vision transformers mostly call one
multiply-add one FLOP: that number is `Flops.macs`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tokred_kernels.checks import check_count
from tokred_kernels.ops.registry import SPECS
from tokred_kernels.patch.state import Step


class Flops(NamedTuple):
    """Operations for one image.

    Attributes:
        per_block: of each block, its match included.
        patch_embed: of the patch embedding.
        head: of pooling and head.
        tokens: how many tokens enter each block, and, last, how many leave: one more than there are blocks. The mean,
            where images differ.
    """

    per_block: tuple[int, ...]
    patch_embed: int
    head: int
    tokens: tuple[float, ...]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.per_block) + self.patch_embed + self.head

    @property
    def gflops(self) -> float:
        """`total` in units of 10^9."""
        return self.total / 1e9

    @property
    def macs(self) -> int:
        """Multiply-adds: half of `total`, what papers on vision transformers print as FLOPs."""
        return self.total // 2


def count(
    model: nn.Module,
    img_size: int | tuple[int, int] | None = None,
    *,
    tokens: Sequence[int] | None = None,
) -> Flops:
    """The operations of a vision transformer for one image, patched or not, from its shapes alone.

    Args:
        model: one of timm or transformers, as `patch` takes it; of a model with a tower for text too, the other one.
        img_size: pixels, (height, width) or one number for both; default the model's own.
        tokens: how many tokens leave each block. Default: what the patch's settings say, or, unpatched, all of them.
            Where that depends on the images, those of the last forward: the mean over its images.

    Raises:
        TypeError, ValueError: a wrong `img_size` or `tokens`.
        RuntimeError: the tokens depend on the images, and there was no forward of this size.
        NotImplementedError: a model of other parts.
        ImportError: the model's library is too old for patches.
    """
    _check_module("count", model)
    given = None if img_size is None else _pixels(img_size)
    if tokens is not None:
        if not isinstance(tokens, Sequence) or isinstance(tokens, str):
            raise TypeError(f"tokred_kernels.flops.count: tokens must be a list of ints, got {type(tokens).__name__}")
        tokens = [check_count("flops.count", "tokens", number) for number in tokens]
    anatomy = made_of(model)
    pixels = image_size(model) if given is None else given
    return _count(model, anatomy, pixels, tokens)


def image_size(model: Any) -> tuple[int, int]:
    """Height and width of the images that a model, which `count` takes, was made for."""
    _check_module("image_size", model)
    return _costs(model).made_for(model)


def made_of(model: Any) -> Any:
    """Return the `ModelSpec` of a vision transformer, patched or not; raise as `count` does."""
    _check_module("made_of", model)
    from tokred_kernels.patch import MARK, models  # noqa: PLC0415  (the patches count by this module)

    return models.anatomy(model) if hasattr(model, MARK) and models.library(model) else models.examine(model)


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"tokred_kernels.flops.{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def counter(**settings: Any) -> FlopCounterMode:
    """torch's FlopCounterMode, with the ops it does not know: attention on the CPU, and this package's match.

    torch 2.13 has formulas for its attention kernels on GPUs alone, so that on a CPU it finds no operations in
    attention at all.

    Args:
        **settings: FlopCounterMode's own, such as `display=False`.
    """
    known: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    for name, spec in SPECS.items():
        if spec.flops is not None:
            known[getattr(torch.ops.tokred, name)] = _of_tensors(spec.flops)
    return FlopCounterMode(custom_mapping={**known, **settings.pop("custom_mapping", {})}, **settings)


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _of_tensors(function: Callable[..., int]) -> Callable[..., int]:
    """Return `function` for FlopCounterMode: called with tensors, since the lengths of packed images are values."""

    def count(*arguments: Any, out_val: Any = None) -> int:
        return function(*arguments)

    count._get_raw = True  # type: ignore[attr-defined]
    return count


def _pixels(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of the images."""
    size = (img_size, img_size) if not isinstance(img_size, (tuple, list)) else tuple(img_size)
    if len(size) != 2:
        raise ValueError(f"tokred_kernels.flops.count: img_size must be one number or (height, width), got {img_size}")
    height, width = size
    return check_count("flops.count", "img_size", height, 1), check_count("flops.count", "img_size", width, 1)


def _costs(model: Any) -> Any:
    """The module that knows what models of the library take around their blocks."""
    from tokred_kernels.patch import models  # noqa: PLC0415  (the patches count by this module)

    return importlib.import_module(f"tokred_kernels.patch.{models.library(model)}_flops")


def _count(model: Any, anatomy: Any, pixels: tuple[int, int], given: Sequence[int] | None) -> Flops:
    costs = _costs(model)
    grid = costs.grid(model, pixels)
    entering = grid[0] * grid[1] + anatomy.num_prefix
    images = _tokens(anatomy, entering, grid, given)
    per_block = []
    for index, (block, parts) in enumerate(zip(anatomy.blocks, anatomy.parts, strict=True)):
        per_block.append(round(_mean([_block(block, parts, *_around(entering, image, index)) for image in images])))
    head = round(_mean([costs.head(model, image[-1][1]) for image in images]))
    left = [[entering, *(after for _, after in image)] for image in images]
    embed = costs.patch_embed(model, pixels, grid)
    return Flops(tuple(per_block), embed, head, tuple(_mean(column) for column in zip(*left, strict=True)))


def _around(entering: int, image: list[tuple[int, int]], index: int) -> tuple[int, int, int]:
    """How many tokens enter block `index`, attend in it, and leave it."""
    return (image[index - 1][1] if index else entering, *image[index])


def _tokens(
    anatomy: Any, entering: int, grid: tuple[int, int], given: Sequence[int] | None
) -> list[list[tuple[int, int]]]:
    """Of each image, or of one for all: of each block, how many tokens attend in it, and how many leave it."""
    depth = len(anatomy.blocks)
    if given is not None:
        if len(given) != depth:
            raise ValueError(
                f"tokred_kernels.flops.count: tokens must have one number for each of {depth} blocks, got {len(given)}"
            )
        return [list(zip((entering, *given), given))]  # noqa: B905  (the last one enters nothing)
    own, tokens = [], entering
    for block in anatomy.blocks:
        step = _step(block)
        attended = step.tokens_attended(tokens, grid)
        after = None if attended is None else step.tokens_after(attended, grid)
        if attended is None or after is None:
            return _recorded(anatomy.model, entering)
        own.append((attended, after))
        tokens = after
    return [own]


def _recorded(model: Any, entering: int) -> list[list[tuple[int, int]]]:
    """The same, of the images of the last forward."""
    record = model.tokred_record
    batch, tokens = record.entered[:2] if record.entered is not None else (0, 0)
    if batch == 0 or tokens != entering:
        found = f"the last one had images of {tokens}" if batch else "there was none"
        raise RuntimeError(
            "tokred_kernels.flops.count: how many tokens merge depends on the images: first run a forward of images of "
            f"{entering} tokens ({found}), or give tokens="
        )
    columns = [[(n,) * batch if isinstance(n, int) else n for n in pair] for pair in record.counts]
    return [[(attended[i], left[i]) for attended, left in columns] for i in range(batch)]


def _mean(values: Sequence[int]) -> float:
    """The mean; an int where it is a whole number."""
    whole, rest = divmod(sum(values), len(values))
    return whole if rest == 0 else sum(values) / len(values)


def _step(block: Any) -> Step:
    """What the block does; of an unpatched one nothing."""
    return getattr(block, "tokred_step", Step()).at(block)


def _block(block: Any, parts: Any, entering: int, attended: int, after: int) -> int:
    """Of one block, and of what is chosen before it, that so many tokens enter, attend in, and leave."""
    choice = _step(block).choice_flops(entering, attended, parts)
    return choice + _self_attention(parts, attended) + after * linear_flops(parts.mlp)


def linear_flops(module: nn.Module) -> int:
    """Of all linear layers inside `module`, for one token."""
    return sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def _self_attention(parts: Any, tokens: int) -> int:
    """Projections, and two products of (N, d) with (N, d) for each head."""
    return tokens * linear_flops(parts.attention) + 4 * tokens * tokens * parts.inner
