# SPDX-License-Identifier: MIT
"""The chain of torch ops of ToMe for diffusion, as in the authors' code (github.com/dbolya/tomesd)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class GridPlan(NamedTuple):
    """Sources (1, num_src, 1) and destinations (1, num_dst, 1) among the tokens.

    `staying` (B, num_src - r, 1) and `joining` (B, r, 1) are indices of sources, and `joined` of destinations.
    """

    sources: Tensor
    destinations: Tensor
    staying: Tensor
    joining: Tensor
    joined: Tensor

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sources and the destinations of (B, N, C)."""
        batch, _, channels = x.shape
        source = x.gather(dim=1, index=self.sources.expand(batch, -1, channels))
        return source, x.gather(dim=1, index=self.destinations.expand(batch, -1, channels))

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        source, destination = self.split(x)
        channels = x.shape[-1]
        stay = source.gather(-2, self.staying.expand(-1, -1, channels))
        join = source.gather(-2, self.joining.expand(-1, -1, channels))
        destination = destination.scatter_reduce(-2, self.joined.expand(-1, -1, channels), join, reduce=mode)
        return torch.cat([stay, destination], dim=1)


def grid_plan(metric: Tensor, r: int, grid: tuple[int, int], stride: tuple[int, int]) -> GridPlan:
    """Run `bipartite_soft_matching_random2d` up to its closures, with the first token of each cell."""
    height, width = grid
    down, across = stride
    with torch.no_grad():
        rows, columns = height // down, width // across
        device, whole = metric.device, torch.int64
        # A buffer of the grid's size has -1 at each cell's destination, so that destinations come first when sorted.
        drawn = torch.zeros(rows, columns, 1, device=device, dtype=whole)
        marks = torch.zeros(rows, columns, down * across, device=device, dtype=whole)
        marks.scatter_(dim=2, index=drawn, src=-torch.ones_like(drawn, dtype=whole))
        marks = marks.view(rows, columns, down, across).transpose(1, 2).reshape(rows * down, columns * across)
        if rows * down < height or columns * across < width:
            inner = marks
            marks = torch.zeros(height, width, device=device, dtype=whole)
            marks[: rows * down, : columns * across] = inner
        order = marks.reshape(1, -1, 1).argsort(dim=1)
        sources, destinations = order[:, rows * columns :, :], order[:, : rows * columns, :]

        unit = metric / metric.norm(dim=-1, keepdim=True)
        plan = GridPlan(sources, destinations, sources, sources, sources)  # not matched yet
        a, b = plan.split(unit)
        scores = a @ b.transpose(-1, -2)
        r = min(a.shape[1], r)
        best, where = scores.max(dim=-1)
        ranked = best.argsort(dim=-1, descending=True)[..., None]
        staying, joining = ranked[..., r:, :], ranked[..., :r, :]
        joined = where[..., None].gather(dim=-2, index=joining)
    return plan._replace(staying=staying, joining=joining, joined=joined)
