# SPDX-License-Identifier: MIT
"""Reductions over the tokens of each slot, in a fixed order, and the gather that is the adjoint of the sum.

On a GPU `scatter_add` and the backward of `gather` add with atomics in arbitrary order. There the tokens are sorted by
slot and summed by `torch.embedding_bag`, in which one thread computes each result. torch has no second derivative of
`embedding_bag`, so the sum and the gather are autograd Functions, each the backward of the other. On other devices
`scatter_add` and `gather` are deterministic and faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokred_kernels.backends.reference import runs_on_gpu


class Segments:
    """The tokens of each slot of `dest` (B, N). Dropped tokens form one more slot, number `num_out`."""

    def __init__(self, dest: Tensor, num_out: int) -> None:
        self.slot = torch.where(dest < 0, num_out, dest).long()
        self.num_slots = num_out + 1
        self.sorts = runs_on_gpu(dest)
        self._sorted: tuple[Tensor, Tensor] | None = None

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` (B, N, C) over the tokens of each slot: (B, num_out + 1, C)."""
        if self.sorts:
            return _Sum.apply(values, self.slot, *self._order())
        return self._full(values, 0.0).scatter_add_(1, _index(self.slot, values), values)

    def spread(self, y: Tensor) -> Tensor:
        """Copy the row of each slot in `y` (B, num_out + 1, C) to its tokens: (B, N, C)."""
        return _Spread.apply(y, self.slot) if self.sorts else y.gather(1, _index(self.slot, y))

    def max(self, values: Tensor) -> Tensor:
        """Return the maximum of `values` over the tokens of each slot, -inf for an empty slot; not differentiable."""
        values = values.detach()
        return self._full(values, -torch.inf).scatter_reduce_(1, _index(self.slot, values), values, "amax")

    def _order(self) -> tuple[Tensor, Tensor]:
        if self._sorted is None:
            self._sorted = _sort(self.slot, self.num_slots)
        return self._sorted

    def _full(self, values: Tensor, value: float) -> Tensor:
        return values.new_full((values.shape[0], self.num_slots, values.shape[2]), value)


def _index(slot: Tensor, values: Tensor) -> Tensor:
    return slot[..., None].expand(-1, -1, values.shape[2])


def _sort(slot: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Return the rows b * N + n ordered by slot (B * N,), and where each slot starts in that order (B, num_slots)."""
    batch, tokens = slot.shape
    ordered, order = slot.sort(dim=1, stable=True)
    slots = torch.arange(num_slots, device=slot.device).repeat(batch, 1)
    image = torch.arange(batch, device=slot.device)[:, None] * tokens
    return (order + image).flatten(), torch.searchsorted(ordered, slots) + image


class _Sum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, slot: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
        batch, tokens, channels = values.shape
        if channels == 0:  # embedding_bag sometimes refuses rows without elements
            return values.new_zeros(*offsets.shape, channels)
        rows = values.reshape(batch * tokens, channels)  # not flatten, for which gradients in batches have no rule
        summed, *_ = torch.embedding_bag(rows, order, offsets.flatten())
        return summed.view(*offsets.shape, channels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(grad, *ctx.saved_tensors), None, None, None


class _Spread(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, slot: Tensor) -> Tensor:
        return y.gather(1, _index(slot, y))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.num_slots = inputs[0].shape[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slot,) = ctx.saved_tensors
        return _Sum.apply(grad, slot, *_sort(slot, ctx.num_slots)), None
