# SPDX-License-Identifier: MIT
"""PyTorch's scaled_dot_product_attention with a bias for each key."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokred_kernels.dtypes import accumulator_of, is_autocasting


def torchs_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, **settings: Any) -> Tensor:
    """Return SDPA of q, k and v (B, H, N, d) with an optional `bias` (B, N) on keys.

    `settings` are passed to SDPA, such as `scale` or `dropout_p`.
    """
    mask = None if bias is None else key_bias(bias, q)
    if q.is_cpu and mask is not None and is_autocasting(q):  # autocast would only round the mask
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **settings)


def key_bias(bias: Tensor, like: Tensor) -> Tensor:
    """Return `bias` (B, N) as an SDPA mask (B, 1, 1, N) for a query like `like`.

    SDPA broadcasts the mask over heads and queries without a copy, so proportional attention needs O(B N) memory, not
    the O(B H N^2) of a bias added to explicit scores. CPU kernels keep scores in float32 and take a float32 mask; the
    fused GPU kernels need the mask in q's dtype.
    """
    return bias[:, None, None, :].to(accumulator_of(like) if like.is_cpu else like.dtype)
