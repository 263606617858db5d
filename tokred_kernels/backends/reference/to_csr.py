# SPDX-License-Identifier: MIT
"""The second view of a map."""

from __future__ import annotations

import torch
from torch import Tensor


def to_csr(dest: Tensor, num_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `token_map_ops.to_csr`."""
    batch, tokens = dest.shape
    slot = torch.where(dest < 0, num_out, dest).long()  # dropped tokens sort last, into a slot of their own
    order = slot.argsort(dim=1, stable=True)
    image = torch.arange(batch, device=dest.device)[:, None] * tokens
    members = torch.where(slot.gather(1, order) < num_out, order + image, -1)
    count = slot.new_zeros(batch, num_out + 1).scatter_add(1, slot, torch.ones_like(slot))[:, :num_out]
    begin = count.cumsum(1) - count + image
    return members.flatten().int(), begin.int(), count.int()
