# SPDX-License-Identifier: MIT
"""Pooling tokens that count as often as the tokens they stand for, of all images alike or packed."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.ops.merge import merge
from tokred_kernels.packing import Packing
from tokred_kernels.token_map import TokenMap


def pool_sized(x: Tensor, size: Tensor, *, kind: str, begin: int) -> Tensor:
    """The mean over the first tokens, of tokens that stand for several of them.

    Args:
        x: (B, N, C).
        size: (B, N, 1), how many first tokens each token stands for.
        kind: "avg"; or "avgmax", half of the sum of mean and maximum.
        begin: so many leading tokens have no part in it.

    Returns:
        (B, C).
    """
    total = size[:, begin:].sum(1, keepdim=True)
    weight = size[:, begin:] / torch.where(total == 0, 1.0, total)  # an image may have dropped all its tokens
    # type_as, not `to`: an exported model would keep the dtype of its export when it is moved to another.
    mean = (x[:, begin:] * weight).sum(1).type_as(x)
    return mean if kind == "avg" else 0.5 * (x[:, begin:].amax(1) + mean)


def pool_packed(x: Tensor, size: Tensor, packing: Packing, *, kind: str, begin: int) -> Tensor:
    """The same of packed tokens x (T, C) with sizes (T, 1), where `kind` may be "max" and "token" (the first) too."""
    if kind == "token":
        return leading_tokens(x, packing, 1)[:, 0]
    image = image_of_row(packing).int()
    if begin:
        image = image.index_fill(0, _leading_rows(packing, begin).flatten(), -1)
    to_image = TokenMap._trusted(image[None], len(packing.lengths))
    if kind == "max":
        return merge(x[None], to_image, reduce="amax")[0]
    mean = merge(x[None], to_image, weight=size[None])[0]
    return mean if kind == "avg" else 0.5 * (merge(x[None], to_image, reduce="amax")[0] + mean)


def leading_tokens(x: Tensor, packing: Packing, number: int) -> Tensor:
    """The first `number` tokens of each image, (B, number, C), of packed tokens (T, C)."""
    return x[_leading_rows(packing, number)]


def image_of_row(packing: Packing) -> Tensor:
    """(T,) int64, the image that each packed row belongs to."""
    return torch.repeat_interleave(packing.cu_seqlens.diff().long(), output_size=packing.rows)


def _leading_rows(packing: Packing, number: int) -> Tensor:
    """(B, number) int64."""
    starts = packing.cu_seqlens[:-1, None].long()
    return starts + torch.arange(number, device=starts.device)
