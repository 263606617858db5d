# SPDX-License-Identifier: MIT
"""Floating-point operations of modules, and a counter that knows this package's ops.

They are counted as torch.utils.flop_counter counts: matrix products, convolutions and attention, where a multiply-add
is two operations; not norms, activations, softmax and data movement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tokred_kernels.ops.registry import SPECS


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
