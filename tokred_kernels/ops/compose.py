# SPDX-License-Identifier: MIT
"""One token map after another."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.reference import compose as reference
from tokred_kernels.ops.library import register


def compose(first: Tensor, second: Tensor) -> Tensor:
    """`dest` (B, N) of the map `first` (B, N), into N1 slots, followed by `second` (B, N1).

    What either drops is dropped. The backend requested by `use_backend` runs it if it can, else the best one.
    """
    backend = backends.best("compose", first)
    if backend == "reference":
        return reference.compose(first, second)
    return _compose(first, second, backend)


def _fake(first: Tensor, second: Tensor, backend: str) -> Tensor:
    return first.new_empty(first.shape, dtype=torch.int32)


_compose = register(
    "compose(Tensor first, Tensor second, str backend) -> Tensor",
    _fake,
    {"first": "int32 (B, N); entries(first, -1, M)", "second": "int32 (B, M)"},
)
