# SPDX-License-Identifier: MIT
"""Positions of the tokens of a grid, of any number of dimensions, before any are learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TEMPERATURE = 10000.0  # between the shortest wave and the longest, as in the first transformer


def smooth_positions(grid: Sequence[int], dim: int) -> Tensor:
    """Sines and cosines of where each token of the grid is, (1, N, dim), by rows.

    Each dimension of the grid has as many channels as another, half of them sines, half cosines, of as many waves; what
    is left over is 0. For two dimensions they are the positions of plain vision transformers that learn none (Chen et
    al., "An Empirical Study of Training Self-Supervised Vision Transformers", 2021).
    """
    count = dim // (2 * len(grid))
    waves = TEMPERATURE ** -(torch.arange(count) / max(1, count))
    places = torch.cartesian_prod(*(torch.arange(length) for length in grid)).view(-1, len(grid))
    angles = (places[:, :, None] * waves).flatten(1)
    positions = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(positions, (0, dim - positions.shape[1]))[None]
