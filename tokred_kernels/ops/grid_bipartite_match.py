# SPDX-License-Identifier: MIT
"""ToMe for diffusion's matching on a grid."""

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

    Each cell of `stride` tokens has one destination: its top left token, or a random one. All other tokens are sources,
    including the rim that the stride does not cover. The `r` sources of highest cosine join; ties go to the lower
    index. The slots are the unmerged sources by descending similarity, then the destinations by index.

    Args:
        metric: (B, N, D), or keys (B, H, N, d), whose mean over heads is used. Not differentiated.
        r: how many tokens to remove, capped at the number of sources.
        grid: height and width in tokens, whose product is N - num_prefix.
        stride: height and width of a cell.
        random: draw the destination of each cell at every call, the same for all images of the batch, so that the
            conditional and unconditional halves of a batch match (as in the authors' code).
        generator: for the draw, on any device; default torch's own for the metric's device.
        num_prefix: the number of leading tokens that are never merged. They come first in the output.

    Returns:
        A TokenMap from N to N - r slots.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong rank, `r < 0`, a grid whose product is not N - num_prefix, or a stride larger than the grid.
        RuntimeError: the backend requested by name cannot run the call.

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
    """Draw the place of each cell's destination in its cell, (cells,) int64 on `device`."""
    height, width, down, across, _ = geometry
    cells = (height // down) * (width // across)
    source = device if generator is None else generator.device
    return torch.randint(down * across, (cells,), device=source, generator=generator).to(device)


def match_cells(
    metric: Tensor, r: int, geometry: tuple[int, int, int, int, int], drawn: Tensor | None = None
) -> TokenMap:
    """Match without checks.

    Args:
        metric, r: as in `grid_bipartite_match`.
        geometry: height and width of the grid and of a cell, and the number of prefix tokens.
        drawn: (cells,), the place of each cell's destination in its cell, by rows. Default: the top left token.
    """
    height, width, down, across, first = geometry
    batch, cells = metric.shape[0], (height // down) * (width // across)
    r = min(r, height * width - cells)
    if r == 0:
        return match(metric, None)
    if drawn is not None:
        sources, destinations = split(*geometry, drawn)
    else:
        # Cache only plain tensors: those of a compiler or a mode must not outlive it, and those made during the capture
        # of a CUDA graph hold nothing before its first replay.
        captured = metric.is_cuda and torch.cuda.is_current_stream_capturing()
        can_cache = can_bypass_dispatcher(metric) and not captured
        sources, destinations = (_cached_split if can_cache else _fixed_split)(*geometry, metric.device)
    lists = sources.expand(batch, -1).contiguous(), destinations.expand(batch, -1).contiguous()
    return match(metric, Partition(first, 1, sources.numel(), cells, 0, 0, False, r, *lists))


def split(height: int, width: int, down: int, across: int, first: int, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sources and the destinations, each by index, int32.

    `drawn` (cells,) is the place of each cell's destination in its cell, by rows.
    """
    columns = width // across
    cell = torch.arange(drawn.numel(), device=drawn.device)
    row = cell // columns * down + drawn // across
    column = cell % columns * across + drawn % across
    destination = row * width + column
    # Sort with the destinations past the end: a boolean mask would read the number of sources back to the host.
    token = torch.arange(height * width, device=drawn.device)
    source = token.scatter(0, destination, height * width).sort().values[: height * width - drawn.numel()]
    return (source + first).int(), (destination.sort().values + first).int()


def _fixed_split(
    height: int, width: int, down: int, across: int, first: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the split with the top left token of each cell as its destination."""
    cells = (height // down) * (width // across)
    return split(height, width, down, across, first, torch.zeros(cells, dtype=torch.int64, device=device))


_cached_split = functools.lru_cache(maxsize=64)(_fixed_split)
