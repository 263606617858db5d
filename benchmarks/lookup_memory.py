# SPDX-License-Identifier: MIT
"""Draws how much memory lookup attention takes beyond its inputs as tokens get more, against weights in memory.

python benchmarks/lookup_memory.py --device cuda --out docs/lookup_memory.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the folder above holds this package, and comes after what is installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import footprint, lookup, machine
from benchmarks.cases import CASES, Case
from tokred_kernels.files import replace_text

TOKENS = tuple(2**n for n in range(10, 17))  # 1,024 to 65,536
BATCH = {"cpu": 1, "cuda": 16}
SEED = 7


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=tuple(BATCH), help=machine.DEVICE_HELP)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="N (default: 1024 to 65536)")
    parser.add_argument("--out", type=Path, default=Path("lookup_memory.png"), help="the picture (%(default)s)")
    options = parser.parse_args(arguments)
    device = machine.chosen_device(parser, options.device)
    rows = [measure(device, tokens) for tokens in options.tokens]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine.describe(), "memory": memory_of(device), "rows": rows}
    replace_text(options.out.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
    draw(rows, options.out)


def memory_of(device: str) -> str:
    return footprint.GPU_MEMORY if device == "cuda" else footprint.CPU_MEMORY


def measure(device: str, tokens: int) -> dict[str, Any]:
    """Bytes of gather and scatter, forward and backward, of this package and with the weights in memory."""
    model = next(case for case in CASES if case.op == "lookup_scatter" and case.training and case.device == device)
    case = dataclasses.replace(model, shape=(BATCH[device], tokens, model.shape[2]))
    inputs = lookup.draw(case, SEED)
    function, arguments = lookup.chain(case)
    return {
        "tokens": tokens,
        "results": lookup.result_bytes(case),
        "tokred": _peak(case, inputs, lookup.ours(case)),
        "materialised": _peak(case, inputs, lambda i: function(*arguments(i))),
    }


def _peak(case: Case, inputs: lookup.Inputs, forward: Callable[[lookup.Inputs], Any]) -> int:
    return footprint.peak_bytes(partial(lookup.with_backward(forward), inputs), case.device)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib  # noqa: PLC0415  (optional)

    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    tokens = [row["tokens"] for row in rows]
    labels = {"materialised": "weights in memory", "tokred": "tokred_kernels", "results": "outputs and gradients alone"}
    for name, label in labels.items():
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
