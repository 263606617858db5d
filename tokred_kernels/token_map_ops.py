# SPDX-License-Identifier: MIT
"""`to_csr` and `compose`: the registered ops that a TokenMap calls itself.

They are not in `ops`, whose functions return and take token maps. The layers are ops -> token_map and this file ->
backends -> packing, partition, windows, ops.registry and other modules of plain data; no import goes the other way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.backends.reference.compose import compose as reference_compose
from tokred_kernels.backends.reference.to_csr import to_csr as reference_to_csr
from tokred_kernels.backends.registration import register


def to_csr(dest: Tensor, num_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the members of each slot: `members` (B * N), `begin` (B, N') and `count` (B, N') of `dest` (B, N), int32.

    The backend requested by `use_backend` runs it if it can, else the best one.
    """
    backend = backends.best("to_csr", dest)
    if backend == "reference":
        return reference_to_csr(dest, num_out)
    return _to_csr(dest, num_out, backend)


def _to_csr_fake(dest: Tensor, num_out: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    slots = (dest.shape[0], num_out)
    return (
        dest.new_empty(dest.shape[0] * dest.shape[1], dtype=torch.int32),
        dest.new_empty(slots, dtype=torch.int32),
        dest.new_empty(slots, dtype=torch.int32),
    )


_to_csr = register(
    "to_csr(Tensor dest, SymInt num_out, str backend) -> (Tensor members, Tensor begin, Tensor count)",
    _to_csr_fake,
    {"dest": "int32 (B, N); entries(dest, -1, num_out)", "num_out": "0 <= num_out <= ROWS"},
)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Return the `dest` (B, N) of the map `first` (B, N), into N1 slots, followed by the map `second` (B, N1).

    A token that either map drops is dropped. The backend requested by `use_backend` runs it if it can, else the best
    one.
    """
    backend = backends.best("compose", first)
    if backend == "reference":
        return reference_compose(first, second)
    return _compose(first, second, backend)


def _compose_fake(first: Tensor, second: Tensor, backend: str) -> Tensor:
    return first.new_empty(first.shape, dtype=torch.int32)


_compose = register(
    "compose(Tensor first, Tensor second, str backend) -> Tensor",
    _compose_fake,
    {"first": "int32 (B, N); entries(first, -1, M)", "second": "int32 (B, M)"},
)
