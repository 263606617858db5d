# SPDX-License-Identifier: MIT
"""Unmerge as a gather."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.reference.segments import Segments


def unmerge(y: Tensor, dest: Tensor) -> Tensor:
    """See `ops.unmerge`."""
    return Segments(dest, y.shape[1]).spread(torch.nn.functional.pad(y, (0, 0, 0, 1)))  # dropped tokens read the zeros
