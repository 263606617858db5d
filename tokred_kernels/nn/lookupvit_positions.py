# SPDX-License-Identifier: MIT
"""Initial positions of the tokens of a grid, in any number of dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TEMPERATURE = 10000.0  # between the shortest wave and the longest, as in the first transformer


def smooth_positions(grid: Sequence[int], dim: int) -> Tensor:
    """Return the sines and cosines of each token's position in the grid, (1, N, dim), in row order.

    Each dimension of the grid has the same number of channels, half of them sines and half cosines; the remaining
    channels are 0. In two dimensions, they are the fixed positions of Chen et al., "An Empirical Study of Training
    Self-Supervised Vision Transformers", 2021.
    """
    count = dim // (2 * len(grid))
    waves = TEMPERATURE ** -(torch.arange(count) / max(1, count))
    places = torch.cartesian_prod(*(torch.arange(length) for length in grid)).view(-1, len(grid))
    angles = (places[:, :, None] * waves).flatten(1)
    positions = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(positions, (0, dim - positions.shape[1]))[None]
