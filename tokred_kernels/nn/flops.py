# SPDX-License-Identifier: MIT
"""Floating-point operations of modules, and a counter that knows this package's ops.

They are counted as torch.utils.flop_counter counts: matrix products, convolutions and attention, where a multiply-add
is two operations; not norms, activations, softmax and data movement.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


class Flops(NamedTuple):
    """Floating-point operations for one image.

    Attributes:
        per_block: for each block, its match included.
        patch_embed: the patch embedding.
        head: pooling and head.
        tokens: how many tokens enter each block, then how many leave the last one: one number more than there are
            blocks. If images differ, these are means.
    """

    per_block: tuple[int, ...]
    patch_embed: int
    head: int
    tokens: tuple[float, ...]

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.per_block) + self.patch_embed + self.head

    @property
    def gflops(self) -> float:
        """`total` in units of 10^9."""
        return self.total / 1e9

    @property
    def macs(self) -> int:
        """Multiply-adds: half of `total`, which papers on vision transformers call FLOPs."""
        return self.total // 2


def linear_flops(module: nn.Module) -> int:
    """Return the FLOPs of all linear layers inside `module` for one token."""
    return sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def counter(**settings: Any) -> FlopCounterMode:
    """Return torch's FlopCounterMode with formulas for attention on the CPU and for this package's ops.

    torch 2.13 has formulas for its GPU attention kernels only, so on a CPU it counts no FLOPs in attention.

    Args:
        **settings: arguments of FlopCounterMode, such as `display=False`.
    """
    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.tokred.bipartite_match: _match,
        torch.ops.tokred.rank_candidates: _rank_candidates,
        torch.ops.tokred.token_attention: _token_attention,
        torch.ops.tokred.token_attention_backward: _token_attention_backward,
        torch.ops.tokred.lookup_gather: _lookup,
        torch.ops.tokred.lookup_scatter: _lookup,
        torch.ops.tokred.lookup_gather_backward: lambda *shapes, **_: _lookup(*shapes[2:]) * 5 // 2,
        torch.ops.tokred.lookup_scatter_backward: lambda *shapes, **_: _lookup(*shapes[1:]) * 5 // 2,
    }
    return FlopCounterMode(custom_mapping={**known, **settings.pop("custom_mapping", {})}, **settings)


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _match(metric: Any, sources: Any, destinations: Any, first: int, stride: int, *rest: Any, **_: Any) -> int:
    num_src, num_dst = rest[0], rest[1]
    return 2 * metric[0] * num_src * num_dst * metric[-1]


def _rank_candidates(metric: Any, sources: Any, destinations: Any, *others: Any, **more: Any) -> int:
    *numbers, cu_seqlens, _ = others
    if cu_seqlens is None:
        return _match(metric.shape, sources, destinations, *numbers)
    tokens = cu_seqlens.diff().tolist()  # each image is split into even and odd tokens
    return sum(2 * (number - number // 2) * (number // 2) * metric.shape[-1] for number in tokens)


def _token_attention(q: Any, k: Any, v: Any, bias: Any, policy: Any, starts: Any, *_: Any, **__: Any) -> int:
    if starts is None:
        return 4 * q.shape[:3].numel() * q.shape[2] * q.shape[3]
    pairs = int(starts.diff().long().square().sum())
    return 4 * pairs * q.shape[1] * q.shape[2]


def _token_attention_backward(grad_out: Any, grad_importance: Any, *inputs: Any, **_: Any) -> int:
    # Five matrix products where the forward has two.
    return _token_attention(*inputs) * 5 // 2


def _lookup(q: Any, k: Any, *_: Any, **__: Any) -> int:
    batch, heads, compressed, channels = q
    return 4 * batch * heads * compressed * k[2] * channels


# Request tensors instead of shapes: the lengths of packed images are in a tensor.
_rank_candidates._get_raw = True  # type: ignore[attr-defined]
_token_attention._get_raw = True  # type: ignore[attr-defined]
_token_attention_backward._get_raw = True  # type: ignore[attr-defined]
