# SPDX-License-Identifier: MIT
"""Progress of a calibration or a search, on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_SECONDS = 5.0  # between two lines, if tqdm is not installed


class Progress:
    """A bar of tqdm, or a line now and then if tqdm is not installed; `total` is the number of batches if known."""

    def __init__(self, name: str, total: int | None, show: bool) -> None:
        self.name = name
        self.total = total
        self.show = show
        self.number = 0
        self.bar: Any = None
        self.printed = time.monotonic()

    def __enter__(self) -> Progress:
        if self.show:
            try:
                from tqdm import tqdm  # noqa: PLC0415  (optional)
            except ImportError:
                return self
            self.bar = tqdm(total=self.total, desc=self.name, unit="batch", leave=False)
        return self

    def update(self, text: str = "") -> None:
        """Count a batch, and show `text` after the count."""
        self.number += 1
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif self.show and time.monotonic() - self.printed >= LINE_SECONDS:
            self.printed = time.monotonic()
            of = "" if self.total is None else f" of {self.total}"
            print(f"{self.name}: batch {self.number}{of}{text and ', '}{text}", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
