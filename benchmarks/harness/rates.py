# SPDX-License-Identifier: MIT
"""The two rates that bound any kernel, measured in the same run: copying memory, and multiplying matrices."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.harness.case import Case
from benchmarks.harness.timing import event_visit, summarise, wall_visit

COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # larger than every cache
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
TURNS = 9


class Rates(NamedTuple):
    """Bytes per second of a copy, reads and writes both counted; operations per second of matmul, by dtype."""

    copy: float
    matmul: dict[str, float]

    def least_seconds(self, case: Case) -> float:
        """Return the lower bound on the time of a case."""
        return max(case.least_bytes() / self.copy, case.operations() / self.matmul[case.dtype])


def measure(device: str, dtypes: set[str]) -> Rates:
    """Measure both rates for the given dtypes."""
    visit = event_visit if device == "cuda" else wall_visit
    source = torch.rand(COPY_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    # Copy into existing memory: on the CPU, the first touch of fresh pages costs more than the copy.
    copying = visit(lambda _: target.copy_(source), 1, 0.0)
    copy = 2 * COPY_BYTES[device] / summarise([copying() for _ in range(TURNS)]).median
    rates = {}
    for dtype in sorted(dtypes):
        size = MATRIX_SIZE[device]
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        product = visit(lambda _, a=a, b=b: a @ b, 1, 0.0)
        rates[dtype] = 2 * size**3 / summarise([product() for _ in range(TURNS)]).median
    return Rates(copy, rates)
