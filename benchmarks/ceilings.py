# SPDX-License-Identifier: MIT
"""The two rates that bound any kernel here, measured in the same run: copying memory, and multiplying matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks import traffic
from benchmarks.cases import Case
from benchmarks.timing import event_visit, summarise, wall_visit

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # far past every cache
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}  # large enough for the library's best rate
TURNS = 9


class Ceilings(NamedTuple):
    """Bytes a second of a copy, read and written both counted; operations a second of a matrix product, by dtype."""

    copy: float
    matmul: dict[str, float]

    def floor_seconds(self, case: Case) -> float:
        """No version of the op runs much faster than this."""
        return max(traffic.least_bytes(case) / self.copy, traffic.operations(case) / self.matmul[case.dtype])


def measure(device: str, dtypes: set[str]) -> Ceilings:
    """Both ceilings of this machine, for the dtypes that the cases use."""
    visit = event_visit if device == "cuda" else wall_visit
    source = torch.rand(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    # Into memory that exists: the first touch of fresh pages costs the CPU more than the copy.
    copying = visit(lambda _: target.copy_(source), 1, 0.0)
    copy = 2 * COPY_BYTES[device] / summarise([copying() for _ in range(TURNS)]).median
    rates = {}
    for dtype in sorted(dtypes):
        size = MATRIX_SIZE[device]
        a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        b = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        product = visit(lambda _, a=a, b=b: a @ b, 1, 0.0)
        rates[dtype] = 2 * size**3 / summarise([product() for _ in range(TURNS)]).median
    return Ceilings(copy, rates)
