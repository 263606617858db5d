# SPDX-License-Identifier: MIT
"""Results as JSON, as Markdown and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokred_kernels.files import replace_text

RESULTS = Path(__file__).resolve().parent / "results"
SCHEMA = 1
Row = dict[str, Any]


def default_path(date: str, device: str, suite: str) -> Path:
    """benchmarks/results/<date>-<device>-<suite>.json."""
    return RESULTS / f"{date[:10]}-{device}-{suite}.json"


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a run in one step: machine, settings, ceilings and rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps({"schema": SCHEMA, **result}, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a run.

    Raises:
        ValueError: the file is of another schema.
    """
    result = json.loads(path.read_text())
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {result.get('schema')}, this code reads {SCHEMA}")
    return result


def markdown(rows: list[Row]) -> str:
    """All rows of a run, a table for each suite."""
    parts = []
    micro = [row for row in rows if row["suite"] == "micro"]
    if micro:
        parts.append(table(
            "Case|Provider|Median, us|20% to 80%|x published|x compiled|Copy share|Matmul share|Floor, us|Launches|"
            "Peak, MB|Targets",
            [
                [
                    row["case"], row["provider"], number(row["median_us"]),
                    f"{number(row['p20_us'])} to {number(row['p80_us'])}",
                    number(row["speedup_published"]), number(row["speedup_compiled"]),
                    percent(row.get("copy_share")), percent(row.get("matmul_share")), number(row.get("floor_us")),
                    number(row["launches"]), number(row["peak_bytes"] / 1e6), verdicts(row),
                ]
                for row in micro
            ],
        ))  # fmt: skip
    models = [row for row in rows if row["suite"] == "model"]
    if models:
        parts.append(table(
            "Case|Provider|Images/s|20% to 80%|GFLOPs|Speed ratio|FLOPs ratio|Efficiency|Peak, MB|Targets",
            [
                [
                    row["case"], row["provider"], number(row["images_per_second"]),
                    f"{number(row['p20_images_per_second'])} to {number(row['p80_images_per_second'])}",
                    number(row["gflops"]), number(row["speed_ratio"]), number(row["flops_ratio"]),
                    number(row["flops_efficiency"]), number(row["peak_bytes"] / 1e6), verdicts(row),
                ]
                for row in models
            ],
        ))  # fmt: skip
    return "\n".join(parts)


def number(value: float | None) -> str:
    """Three digits that mean something, and "-" for what was not measured."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def verdicts(row: Row) -> str:
    """Each target of a row, and whether it is met."""
    return "; ".join(f"{t['target']}: {verdict(t['met'])}" for t in row["targets"]) or "-"


def verdict(met: bool | None) -> str:
    return {True: "met", False: "**missed**", None: "not measured"}[met]


def plot(rows: list[Row], path: Path) -> None:
    """Bars: how many times as fast as its baseline each provider is, on a logarithmic scale."""
    import matplotlib  # noqa: PLC0415  (optional: only --plot needs it)

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    bars = [(r["case"], r["provider"], r.get("speedup_published") or r.get("speed_ratio")) for r in rows]
    bars = [bar for bar in bars if bar[2] is not None and bar[1] not in ("published", "unpatched")]
    names = list(dict.fromkeys(provider for _, provider, _ in bars))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.28 * len(bars)), layout="constrained")
    for place, (_, provider, value) in enumerate(bars):
        axes.barh(place, value - 1, left=1, color=f"C{names.index(provider)}")
    axes.set_yticks(range(len(bars)), [f"{case}  {provider}" for case, provider, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as the published chain, or the unpatched model")
    figure.savefig(path)
    pyplot.close(figure)


def table(header: str, lines: list[list[str]]) -> str:
    names = header.split("|")
    rule = ["---"] * len(names)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [names, rule, *lines]) + "\n"
