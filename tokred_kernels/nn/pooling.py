# SPDX-License-Identifier: MIT
"""Pool tokens weighted by their sizes, in rectangular and packed batches."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.ops.merge import merge
from tokred_kernels.packing import Packing
from tokred_kernels.token_map import TokenMap


def pool_sized(x: Tensor, size: Tensor, *, kind: str, begin: int) -> Tensor:
    """Return the mean of the tokens, weighted by their sizes.

    Args:
        x: (B, N, C).
        size: (B, N, 1), how many input tokens each token represents.
        kind: "avg", or "avgmax" for half of the sum of mean and maximum.
        begin: this many leading tokens are left out.

    Returns:
        (B, C).
    """
    total = size[:, begin:].sum(1, keepdim=True)
    weight = size[:, begin:] / torch.where(total == 0, 1.0, total)  # an image can have dropped all its tokens
    # type_as, not `to`: an exported model would keep the dtype of its export when it moves to another one.
    mean = (x[:, begin:] * weight).sum(1).type_as(x)
    return mean if kind == "avg" else 0.5 * (x[:, begin:].amax(1) + mean)


def pool_packed(x: Tensor, size: Tensor, packing: Packing, *, kind: str, begin: int) -> Tensor:
    """Pool packed tokens x (T, C) with sizes (T, 1); `kind` can also be "max", or "token" for the first token."""
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
    """Return the first `number` tokens of each image, (B, number, C), from packed tokens (T, C)."""
    return x[_leading_rows(packing, number)]


def image_of_row(packing: Packing) -> Tensor:
    """Return the image of each packed row, (T,) int64."""
    return torch.repeat_interleave(packing.cu_seqlens.diff().long(), output_size=packing.rows)


def _leading_rows(packing: Packing, number: int) -> Tensor:
    """Return the rows of the first `number` tokens of each image, (B, number) int64."""
    starts = packing.cu_seqlens[:-1, None].long()
    return starts + torch.arange(number, device=starts.device)
