# SPDX-License-Identifier: MIT
"""Pictures of merged tokens, and plots of speed and accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import tokred_kernels as tk

PICTURE = 448  # pixels, twice the usual resolution of a ViT


def write_pictures(
    out: Path,
    pictures: dict[str, Image.Image],
    maps: dict[str, list[tk.TokenMap]],
    *,
    size: tuple[int, int],
    grid: tuple[int, int],
    prefix: int,
) -> None:
    """Save a strip for each photograph, with its tokens for each row of the table, and one sheet with all strips.

    Args:
        out: the folder.
        pictures: the photographs by name.
        maps: the maps of all pictures by the label of the row; rows without a merge are not drawn.
        size: width and height of the model's input.
        grid: number of patches down and across.
        prefix: number of tokens before the patches.
    """
    scale = PICTURE / max(size)
    size = (round(size[0] * scale), round(size[1] * scale))
    shown = {label: own for label, own in maps.items() if any(one.num_out < one.num_tokens for one in own)}
    strips = []
    for index, (name, picture) in enumerate(tqdm(pictures.items(), desc="pictures", unit="photo", leave=False)):
        crop = ImageOps.fit(picture, size, Image.Resampling.BICUBIC)
        parts, captions = [crop], ["photograph"]
        for label, own in shown.items():
            parts.append(tk.viz.draw_tokens(crop, own[index], grid=grid, num_prefix=prefix))
            captions.append(f"{label}: {own[index].num_out} of {own[index].num_tokens} tokens")
        strips.append(side_by_side(parts, captions))
        strips[-1].save(out / f"tokens-{name}.png")
    save_sheet(strips, out / "tokens.png")


def save_sheet(strips: list[Image.Image], path: Path) -> None:
    """Save a sheet of up to eight strips."""
    rows = strips[:8]
    sheet = Image.new("RGB", (rows[0].width, sum(strip.height for strip in rows)), "white")
    for number, strip in enumerate(rows):
        sheet.paste(strip, (0, number * rows[0].height))
    sheet.save(path)


def side_by_side(parts: list[Image.Image], captions: list[str], gap: int = 12, line: int = 34) -> Image.Image:
    """Return the pictures in a row, with captions above."""
    width, height = parts[0].size
    strip = Image.new("RGB", (len(parts) * (width + gap) + gap, height + line + gap), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(20)
    for number, (part, caption) in enumerate(zip(parts, captions, strict=True)):
        left = gap + number * (width + gap)
        strip.paste(part, (left, line))
        draw.text((left, line / 2), caption, fill="black", font=font, anchor="lm")
    return strip


def write_plot(path: Path, rows: list[dict[str, Any]], title: str, axis: str) -> None:
    """Plot speed and operations against the values of the rows. The first row, of the unpatched model, has none."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    measured = [row for row in rows if row["value"] is not None]
    values = [row["value"] for row in measured]
    speed = [row["speedup"] for row in measured]
    spread = [
        [row["speedup"] - row["speedup_lowest"] for row in measured],
        [row["speedup_highest"] - row["speedup"] for row in measured],
    ]
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.axhline(1, color="0.7", linewidth=1)
    axes.plot(values, [row["flops_ratio"] for row in measured], "--", color="0.45", label="operations ratio")
    axes.errorbar(values, speed, spread, marker="o", capsize=3, color="C0", label="speed ratio (median and range)")
    for x, y, row in zip(values, speed, measured, strict=True):
        axes.annotate(
            f"{row['tokens']:.4g} tokens", (x, y), (6, -13), textcoords="offset points", fontsize=8, color="0.3"
        )
    axes.set(xlabel=axis, ylabel="relative to the unpatched model")
    axes.set_xticks(values, [f"{value:.4g}" for value in values])
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_accuracy(path: Path, rows: list[dict[str, Any]]) -> None:
    """Plot accuracy against operations, with a point and the range of the seeds for each row."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    first = rows[0]["accuracy"]
    axes.axhspan(first - 1, first, color="0.94", label="within a point of the plain model")
    points = [(row["gflops"] * 1e3, row["accuracy"]) for row in rows]
    for number, (point, row) in enumerate(zip(points, rows, strict=True)):
        axes.plot(*point, "o", color=f"C{number}", markersize=8)
        axes.vlines(point[0], min(row["accuracies"]), max(row["accuracies"]), color=f"C{number}", alpha=0.5)
    axes.margins(0.15)
    axes.set(xlabel="operations an image, millions", ylabel="test accuracy, percent")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    label_points(axes, points, [row["method"] for row in rows])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def label_points(axes: Any, points: list[tuple[float, float]], labels: list[str]) -> None:
    """Write a label next to each point, in its colour, so that it covers no other point or label."""
    from matplotlib.transforms import Bbox  # noqa: PLC0415

    axes.figure.canvas.draw()  # computes the layout
    size = 5  # half the width of a point
    middles = axes.transData.transform(points)
    taken = [Bbox.from_extents(x - size, y - size, x + size, y + size) for x, y in middles]
    for number, (point, text) in enumerate(zip(points, labels, strict=True)):
        written = []
        for across, up in ((8, -13), (8, 6), (-8, -13), (-8, 6), (8, -26), (-8, -26), (8, 19), (-8, 19)):
            label = axes.annotate(
                text,
                point,
                (across, up),
                textcoords="offset points",
                ha="left" if across > 0 else "right",
                color=f"C{number}",
            )
            written.append(label)
            others = taken[:number] + taken[number + 1 :]
            if not label.get_window_extent().count_overlaps(others):
                break
        for label in written[:-1]:
            label.remove()
        taken.append(written[-1].get_window_extent())
