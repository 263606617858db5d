# SPDX-License-Identifier: MIT
"""ALGM's chains of torch ops.

They have the ops of the authors' code (github.com/tue-mps/algm-segmenter) in the same order, with its `rearrange` calls
written as views. As in that code, the number of merging tokens is a tensor, which the host reads wherever it is used as
a size. So torch.compile breaks the graph there, and a CUDA graph cannot capture the chains.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.baselines.tome import BipartitePlan, ranked_sources


class WindowPlan(NamedTuple):
    """The windows that merge. Indices are those of the grid's tokens, after the class token.

    Attributes:
        joining: all tokens of merging windows except the last of each window (B, count * (size - 1), 1).
        last: the last token of each merging window (B, count, 1).
        joined: the window of each joining token.
        staying: the tokens of other windows (B, rest, 1).
        count, size: number of merging windows, and of tokens in each.
    """

    joining: Tensor
    last: Tensor
    joined: Tensor
    staying: Tensor
    count: Tensor
    size: int

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        class_token, grid = x[:, :1, :], x[:, 1:, :]
        batch, tokens, channels = grid.shape
        num_join = int(self.count * (self.size - 1))
        join = grid.gather(-2, self.joining.expand(batch, num_join, channels))
        num_last = int(self.count)
        last = grid.gather(-2, self.last.expand(batch, num_last, channels))
        num_stay = int(tokens - self.count * self.size)
        stay = grid.gather(-2, self.staying.expand(batch, num_stay, channels))
        num_join = int(self.count * (self.size - 1))
        last = last.scatter_reduce(-2, self.joined.expand(batch, num_join, channels), join, reduce=mode)
        y = torch.cat([last, stay], dim=1)
        return torch.cat((class_token, y), dim=1)


def window_plan(x: Tensor, threshold: float, window: tuple[int, int]) -> WindowPlan:
    """Run ALGM's `conditional_pooling` up to its closure, on x (B, 1 + n * n, C); the window's sides divide n."""
    with torch.no_grad():
        height, width = window
        size = height * width
        x = x[:, 1:, :]
        batch, tokens, channels = x.shape
        side = math.isqrt(tokens)
        down, across = side // height, side // width
        grid = x.view(batch, side, side, channels).permute(0, 3, 1, 2)
        cut = grid.reshape(batch, channels, down, height, across, width).permute(0, 2, 4, 1, 3, 5)
        flat = cut.reshape(batch, down, across, channels, -1)
        cosines = F.cosine_similarity(flat.unsqueeze(-1), flat.unsqueeze(-2), dim=3)
        others = 1 - torch.eye(size).to(x.device)
        cosines = cosines * others
        mean = (cosines.sum(-1).sum(-1) / (size * (size - 1))).unsqueeze(1).view(batch, -1)

        # The smallest number, over the batch, of windows at or above the threshold.
        least = torch.tensor(threshold).to(x.device).repeat(1, mean.shape[1])
        count = torch.ge(mean, least).sum(dim=1).min()
        number = int(count)
        _, merging = mean.topk(number, dim=-1)

        token = torch.arange(side * side).reshape(side, side).to(x.device).unsqueeze(0).repeat(batch, 1, 1)
        windows = token.unfold(1, height, height).unfold(2, width, width).reshape(batch, -1, size)
        merged = windows.gather(1, merging.unsqueeze(-1).expand(-1, -1, size))
        mask = torch.ones((batch, windows.shape[1]), dtype=torch.bool).to(x.device)
        mask.scatter_(1, merging, torch.zeros_like(merging, dtype=torch.bool).to(x.device))
        rest = windows[mask.unsqueeze(-1).expand(-1, -1, size)].reshape(batch, -1, size)
        staying = rest.reshape(batch, -1).sort(dim=-1).values.unsqueeze(-1)
        joining = merged[:, :, : size - 1].reshape(batch, -1).unsqueeze(-1)
        last = merged[:, :, size - 1].reshape(batch, -1).unsqueeze(-1)
        slot = torch.arange(joining.shape[1] // (size - 1)).repeat_interleave(size - 1)
        joined = slot.repeat(batch, 1).unsqueeze(-1).to(x.device)
    return WindowPlan(joining, last, joined, staying, count, size)


def adaptive_plan(
    metric: Tensor, layer_index: float, class_token: bool = False, distill_token: bool = False
) -> BipartitePlan:
    """Run ALGM's `turbo_matching` up to its closure, which is the same as ToMe's."""
    with torch.no_grad():
        best, where, order = ranked_sources(metric, class_token, distill_token)

        # The smallest number, over the batch, of sources at or above the threshold, which leaves out the first source.
        free = best[:, 1:]
        least = torch.add(free.mean(dim=1).mean(), best[:, 1:].std(dim=1).mean() / layer_index)
        count = torch.ge(best, least.repeat(1, best.shape[1])).sum(dim=1).min()

        first, last = int(count), int(count)
        staying, joining = order[..., first:, :], order[..., :last, :]
        joined = where[..., None].gather(-2, joining)
        if class_token:
            staying = staying.sort(dim=1)[0]
    return BipartitePlan(staying, joining, joined, metric.shape[1], distill_token)
