# SPDX-License-Identifier: MIT
"""The partition of a grid of tokens into windows."""

from __future__ import annotations

from typing import NamedTuple


class Windows(NamedTuple):
    """Windows of `height` x `width` tokens, in row order, over the grid that follows the first `first` tokens.

    If the window does not divide the grid, the tokens left at the right and bottom are in no window.
    """

    first: int
    grid_height: int
    grid_width: int
    height: int
    width: int

    def num_tokens(self) -> int:
        """Return N, which includes the first tokens."""
        return self.first + self.grid_height * self.grid_width

    def down(self) -> int:
        """Return the windows in a column."""
        return self.grid_height // self.height

    def across(self) -> int:
        """Return the windows in a row."""
        return self.grid_width // self.width

    def number(self) -> int:
        """Return W, the windows of an image."""
        return self.down() * self.across()

    def size(self) -> int:
        """Return the tokens in a window."""
        return self.height * self.width


# The fields of `Windows` as arguments of a registered op.
SCHEMA = "SymInt first, SymInt grid_height, SymInt grid_width, SymInt height, SymInt width"
# The conditions on these arguments; see `ops.arguments`.
RULES = {
    "first": "first >= 0",
    "grid_height": "grid_height >= 0",
    "grid_width": "grid_width >= 0 and N == first + grid_height * grid_width <= ROWS",
    "height": "1 <= height <= max(grid_height, 1)",
    "width": "1 <= width <= max(grid_width, 1)",
}
