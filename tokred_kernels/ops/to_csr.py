# SPDX-License-Identifier: MIT
"""From `dest` to the members of each slot: the second view of a token map."""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.reference import to_csr as reference
from tokred_kernels.ops.library import register


def to_csr(dest: Tensor, num_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """`members` (B * N), `begin` (B, N') and `count` (B, N') of `dest` (B, N), all int32.

    The backend requested by `use_backend` runs it if it can, else the best one.
    """
    backend = backends.best("to_csr", dest)
    if backend == "reference":
        return reference.to_csr(dest, num_out)
    return _to_csr(dest, num_out, backend)


def _fake(dest: Tensor, num_out: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    slots = (dest.shape[0], num_out)
    return (
        dest.new_empty(dest.shape[0] * dest.shape[1], dtype=torch.int32),
        dest.new_empty(slots, dtype=torch.int32),
        dest.new_empty(slots, dtype=torch.int32),
    )


_to_csr = register(
    "to_csr(Tensor dest, SymInt num_out, str backend) -> (Tensor members, Tensor begin, Tensor count)",
    _fake,
    {"dest": "int32 (B, N); entries(dest, -1, num_out)", "num_out": "0 <= num_out <= ROWS"},
)
