# SPDX-License-Identifier: MIT
"""The windows of a grid of tokens."""

from __future__ import annotations

from typing import NamedTuple


class Windows(NamedTuple):
    """Windows of `height` x `width` tokens from the top left of a grid that follows `first` tokens, row by row.

    If they do not divide the grid, the rest at its right and bottom, the rim, is in no window.
    """

    first: int
    grid_height: int
    grid_width: int
    height: int
    width: int

    def num_tokens(self) -> int:
        """Return N, including the leading tokens."""
        return self.first + self.grid_height * self.grid_width

    def down(self) -> int:
        """Return the number of windows in a column."""
        return self.grid_height // self.height

    def across(self) -> int:
        """Return the number of windows in a row."""
        return self.grid_width // self.width

    def number(self) -> int:
        """Return W, the number of windows of an image."""
        return self.down() * self.across()

    def size(self) -> int:
        """Return the number of tokens in a window."""
        return self.height * self.width


# The windows among the arguments of a registered op.
SCHEMA = "SymInt first, SymInt grid_height, SymInt grid_width, SymInt height, SymInt width"
# Their rules; see `backends.arguments`.
RULES = {
    "first": "first >= 0",
    "grid_height": "grid_height >= 0",
    "grid_width": "grid_width >= 0 and N == first + grid_height * grid_width <= ROWS",
    "height": "1 <= height <= max(grid_height, 1)",
    "width": "1 <= width <= max(grid_width, 1)",
}
