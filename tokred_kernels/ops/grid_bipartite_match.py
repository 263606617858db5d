# SPDX-License-Identifier: MIT
"""Matching on a grid, as ToMe for diffusion does it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tokred_kernels.checks import check_count, check_flag, check_generator, check_metric
from tokred_kernels.ops.bipartite_match import match
from tokred_kernels.ops.window_match import check_pair
from tokred_kernels.partition import Partition
from tokred_kernels.token_map import TokenMap
from tokred_kernels.torch_state import can_bypass_dispatcher

OP = "grid_bipartite_match"


def grid_bipartite_match(
    metric: Tensor,
    r: int,
    *,
    grid: tuple[int, int],
    stride: tuple[int, int] = (2, 2),
    random: bool = False,
    generator: torch.Generator | None = None,
    num_prefix: int = 0,
) -> TokenMap:
    """Merge the `r` tokens most similar to one of a sparse grid of destinations (ToMe for Stable Diffusion, section 3).

    Every cell of `stride` tokens has one destination, its top left token or a random one; all others are sources, those
    of a rim that the stride leaves over, too. The `r` sources of highest cosine join; ties go to the lower index. The
    slots are the unmerged sources by descending similarity, then the destinations by index.

    Args:
        metric: (B, N, D), or the keys of all heads (B, H, N, d), whose mean is taken. Not differentiated.
        r: how many tokens to remove, at most the number of sources: more is cut to that.
        grid: height and width in tokens, whose product is N - num_prefix.
        stride: height and width of a cell.
        random: draw the destination of each cell anew at every call, alike for all images of the batch (so that a
            prompt and its absence see the same, as in the published code).
        generator: for the draw, of any device; default torch's own of the metric's device.
        num_prefix: so many leading tokens are never merged and come first in the output.

    Returns:
        A TokenMap from N to N - r slots.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong rank, `r < 0`, a grid whose product is not N - num_prefix, or a stride larger than the grid.
        RuntimeError: the backend asked for cannot serve the call.

    O(N^2 D / (sy sx)) operations and O(B N) memory in the kernels.
    """
    check_metric(OP, metric)
    r = check_count(OP, "r", r)
    num_prefix = check_count(OP, "num_prefix", num_prefix)
    height, width = check_pair(OP, "grid", grid)
    down, across = check_pair(OP, "stride", stride)
    check_flag(OP, "random", random)
    check_generator(OP, generator)
    tokens = metric.shape[-2]
    if height * width != tokens - num_prefix:
        raise ValueError(
            f"tokred_kernels.{OP}: grid must hold N - num_prefix = {tokens} - {num_prefix} tokens, got "
            f"{(height, width)}, which holds {height * width}"
        )
    if down > height or across > width:
        raise ValueError(f"tokred_kernels.{OP}: stride must fit into the grid {(height, width)}, got {(down, across)}")
    geometry = (height, width, down, across, num_prefix)
    drawn = draw_places(geometry, metric.device, generator) if random and r else None
    return match_cells(metric, r, geometry, drawn)


def draw_places(
    geometry: tuple[int, int, int, int, int], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Draw the place of each cell's destination in the cell, (cells,) int64 on `device`."""
    height, width, down, across, _ = geometry
    cells = (height // down) * (width // across)
    source = device if generator is None else generator.device
    return torch.randint(down * across, (cells,), device=source, generator=generator).to(device)


def match_cells(
    metric: Tensor, r: int, geometry: tuple[int, int, int, int, int], drawn: Tensor | None = None
) -> TokenMap:
    """Match without checks.

    Args:
        metric, r: of `grid_bipartite_match`.
        geometry: height and width of the grid and of a cell, and the number of prefix tokens.
        drawn: (cells,), the place of each cell's destination in the cell, by rows. Default its top left token.
    """
    height, width, down, across, first = geometry
    batch, cells = metric.shape[0], (height // down) * (width // across)
    r = min(r, height * width - cells)
    if r == 0:
        return match(metric, None)
    if drawn is not None:
        sources, destinations = split(*geometry, drawn)
    else:
        # Only plain tensors are kept: the stand-ins of a compiler or a mode must not outlive it, and those of a CUDA
        # graph hold nothing before its first replay.
        captured = metric.is_cuda and torch.cuda.is_current_stream_capturing()
        kept = can_bypass_dispatcher(metric) and not captured
        sources, destinations = (_kept_split if kept else _fixed_split)(*geometry, metric.device)
    lists = sources.expand(batch, -1).contiguous(), destinations.expand(batch, -1).contiguous()
    return match(metric, Partition(first, 1, sources.numel(), cells, 0, 0, False, r, *lists))


def split(height: int, width: int, down: int, across: int, first: int, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that are sources and those that are destinations, each by index, int32.

    `drawn` (cells,) is the place of each cell's destination in the cell, by rows.
    """
    columns = width // across
    cell = torch.arange(drawn.numel(), device=drawn.device)
    row = cell // columns * down + drawn // across
    column = cell % columns * across + drawn % across
    destination = row * width + column
    # Sorted, with the destinations past the end: no read back of how many there are.
    token = torch.arange(height * width, device=drawn.device)
    source = token.scatter(0, destination, height * width).sort().values[: height * width - drawn.numel()]
    return (source + first).int(), (destination.sort().values + first).int()


def _fixed_split(
    height: int, width: int, down: int, across: int, first: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The split with the top left token of each cell."""
    cells = (height // down) * (width // across)
    return split(height, width, down, across, first, torch.zeros(cells, dtype=torch.int64, device=device))


_kept_split = functools.lru_cache(maxsize=64)(_fixed_split)
