# SPDX-License-Identifier: MIT
"""Plots the memory of lookup attention against the number of tokens, and that of attention with weights in memory.

python experiments/lookup_memory.py --device cuda --out docs/lookup_memory.png
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for benchmarks

from benchmarks.families import CASES
from benchmarks.harness import machine, memory
from benchmarks.harness.arguments import DEVICE_HELP, chosen_device
from benchmarks.harness.check import with_backward
from tokred_kernels.files import replace_json

TOKENS = tuple(2**n for n in range(10, 17))  # 1,024 to 65,536
BATCH = {"cpu": 1, "cuda": 16}
SEED = 7
LABELS = {"materialised": "weights in memory", "tokred": "tokred_kernels", "results": "outputs and gradients alone"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=tuple(BATCH), help=DEVICE_HELP)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="N (default: 1024 to 65536)")
    parser.add_argument("--out", type=Path, default=Path("lookup_memory.png"), help="the picture (%(default)s)")
    options = parser.parse_args(arguments)
    device = chosen_device(parser, options.device)
    rows = [measure(device, tokens) for tokens in options.tokens]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    replace_json(options.out.with_suffix(".json"), {"machine": machine.describe(), "rows": rows})
    draw(rows, options.out)


def measure(device: str, tokens: int) -> dict[str, Any]:
    """Return the bytes of gather and scatter, forward and backward, of this package and with the weights in memory."""
    model = next(case for case in CASES if case.op == "lookup_scatter" and case.training and case.device == device)
    case = dataclasses.replace(model, shape=(BATCH[device], tokens, model.shape[2]))
    inputs = case.draw(SEED)
    function, names = case.baseline()
    forwards = {"tokred": case.ours, "materialised": lambda i: function(*(getattr(i, name) for name in names))}
    peaks = {
        name: memory.peak_bytes(partial(with_backward(forward), inputs), device) for name, forward in forwards.items()
    }
    return {"tokens": tokens, "results": case.result_bytes(), **peaks}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib  # noqa: PLC0415  (optional)

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    tokens = [row["tokens"] for row in rows]
    for name, label in LABELS.items():
        style = "--" if name == "results" else "o-"
        axes.plot(tokens, [row[name] / 2**20 for row in rows], style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="lookup tokens N, of 100 compressed ones", ylabel="peak memory beyond the inputs, MiB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
