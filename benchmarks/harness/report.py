# SPDX-License-Identifier: MIT
"""Numbers and Markdown tables."""

from __future__ import annotations


def number(value: float | None) -> str:
    """Return three significant digits, or "-" for None."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def verdict(met: bool | None) -> str:
    """Return the text for a target that is met or not."""
    return {True: "met", False: "**missed**", None: "not measured"}[met]


def table(header: str, lines: list[list[str]]) -> str:
    """Return a Markdown table; `header` has "|" between its columns."""
    names = header.split("|")
    rows = [names, ["---"] * len(names), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
