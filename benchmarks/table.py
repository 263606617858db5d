# SPDX-License-Identifier: MIT
"""Writes the README's table of results from the newest complete run of each device and suite.

python benchmarks/table.py            rewrite the part between the markers
python benchmarks/table.py --check    exit with 1 if the README differs from the results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.families import CASES, MODEL_CASES, ModelCase
from benchmarks.harness import records
from benchmarks.harness.case import MEASURES, Case, Target
from benchmarks.harness.records import Row
from benchmarks.harness.report import number, table, verdict
from tokred_kernels.files import replace_text

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
DEVICES = {"cpu": "CPU", "cuda": "NVIDIA GPU (targets are for an H100)"}
NOT_MEASURED = "not measured yet"
OP_COLUMNS = "Op|Shape|Baseline|Compiled|Others|Ours|Reached|Target|Met"
MODEL_COLUMNS = "Model, ToMe|Unpatched, images/s|Patched, images/s|Speed|FLOPs|Speed over FLOPs|Target|Met"
OP_TARGETS, MODEL_TARGETS = f"Op|Shape|Target, {NOT_MEASURED}", f"Model, ToMe|Target, {NOT_MEASURED}"
DTYPE_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
YARDSTICKS = {"clone": "`x.clone()`", "fused": "SDPA", "flex": "FlexAttention"}
OURS = ("cpu", "cuda", "triton", "auto")

NOTE = """Times are medians of interleaved rounds in one run, after a check of every result. Baseline: the torch ops
of the authors' code, or for LookupViT, which has no published code, of the paper's equations. Compiled: the baseline
under `torch.compile`; if the number of merged tokens is adaptive, the host reads it, and it is compiled in parts.
SDPA has neither sizes, policy nor importance; FlexAttention has the same sizes. `x.clone()` copies the tokens. No op
that reads and writes every token can beat a copy, so a target is out of reach on a machine where the baseline takes
less than the target's multiple of a copy. Peak memory is that of a separate process and includes memory of C++ code.
GPU times are those of replayed CUDA graphs, or of eager calls if the host reads a count; the files have both. Models
are timed in the same way, unpatched and patched, because the host cannot launch late layers as fast as a GPU runs
them."""


class Run:
    """One recorded run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.result = records.read_json(path)
        self.settings, self.machine = self.result["settings"], self.result["machine"]

    def row(self, case: str, provider: str) -> Row | None:
        """Return the row of one provider."""
        rows = self.result["rows"]
        return next((row for row in rows if (row["case"], row["provider"]) == (case, provider)), None)

    def ours(self, case: str) -> Row | None:
        """Return the row of our fastest backend, without the reference."""
        rows = [row for row in self.result["rows"] if row["case"] == case and row["provider"] in OURS]
        return min(rows, key=lambda row: row["median_us"], default=None)

    def describe(self, root: Path) -> str:
        """Return the machine, and a link to the file."""
        m = self.machine
        if self.settings["device"] == "cuda":
            name = f"{m['gpu']}, driver {m['driver']}"
        else:
            name = f"{m['cpu']}, {m['threads']} threads"
        changes = {True: " with changes", False: "", None: ", possibly with changes"}[m["dirty"]]
        path = self.path.resolve()
        link = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        commit = (m["commit"] or "unknown")[:9] + changes
        return f"{name}, torch {m['torch']}, commit {commit}, {m['date'][:10]}: [{path.name}]({link})"


def newest(folder: Path, device: str, suite: str) -> Run | None:
    """Return the newest complete run of a suite on a device."""
    runs = [
        run for run in map(Run, sorted(folder.glob("*.json")))
        if run.settings["complete"] and run.settings["device"] == device and run.settings["suite"] in (suite, "all")
    ]  # fmt: skip
    return max(runs, key=lambda run: run.machine["date"], default=None)


def build(folder: Path, root: Path) -> str:
    """Return the Markdown between the markers."""
    parts = []
    for device, title in DEVICES.items():
        micro, model = newest(folder, device, "micro"), newest(folder, device, "model")
        parts.append(f"**{title}**")
        parts += dict.fromkeys(run.describe(root) for run in (micro, model) if run) or ["Not measured yet. Targets:"]
        targets = [(case, target) for case in CASES if case.device == device for target in case.targets]
        if micro:
            parts.append(table(OP_COLUMNS, [_op_cells(case, target, micro) for case, target in targets]))
        else:
            parts.append(table(OP_TARGETS, [[_op(case), _shape(case), str(target)] for case, target in targets]))
        cases = [case for case in MODEL_CASES if case.device == device and (model or case.targets)]
        if cases and model:
            parts.append(table(MODEL_COLUMNS, [_model_cells(case, model) for case in cases]))
        elif cases:
            parts.append(table(MODEL_TARGETS, [[_model(case), _targets(case)] for case in cases]))
    return "\n\n".join([*parts, NOTE])


def _op(case: Case) -> str:
    return f"`{case.op}`" + (", overhead on the host" if case.host else "")


def _shape(case: Case) -> str:
    return f"{case.label}, {DTYPE_NAMES[case.dtype]}"


def _model(case: ModelCase) -> str:
    return f"{case.model}, batch {case.batch}, r {case.r}, {DTYPE_NAMES[case.dtype]}"


def _targets(case: ModelCase) -> str:
    return "; ".join(map(str, case.targets)) or "-"


def _op_cells(case: Case, target: Target, run: Run) -> list[str]:
    ours = run.ours(case.name)
    if ours is None:
        return [_op(case), _shape(case), "-", "-", "-", "-", "-", str(target), NOT_MEASURED]
    key = (target.measure, target.bound)  # a target that is newer than the run is not judged
    judged = next((t for t in ours["targets"] if (t["measure"], t["bound"]) == key), {"value": None, "met": None})
    reached = "-" if judged["value"] is None else MEASURES[target.measure][2].format(judged["value"])
    others = ((title, run.row(case.name, name)) for name, title in YARDSTICKS.items())
    return [
        _op(case), _shape(case), *(_time(run.row(case.name, name)) for name in ("baseline", "compiled")),
        "; ".join(f"{title} {_time(row)}" for title, row in others if row) or "-",
        f"{_time(ours)} ({ours['provider']})", reached, str(target), verdict(judged["met"]),
    ]  # fmt: skip


def _model_cells(case: ModelCase, run: Run) -> list[str]:
    ours = run.ours(case.name)
    if ours is None:
        return [_model(case), "-", "-", "-", "-", "-", _targets(case), NOT_MEASURED]
    return [
        _model(case), number(ours["unpatched_images_per_second"]),
        f"{number(ours['images_per_second'])} ({ours['provider']})",
        f"{ours['speed_ratio']:.2f}x", f"{ours['flops_ratio']:.2f}x", f"{ours['flops_efficiency']:.2f}",
        _targets(case), "; ".join(verdict(t["met"]) for t in ours["targets"]) or "-",
    ]  # fmt: skip


def _time(row: Row | None) -> str:
    if row is None:
        return "-"
    microseconds = row["median_us"]
    return f"{number(microseconds)} us" if microseconds < 1000 else f"{number(microseconds / 1000)} ms"


def replace(text: str, table: str) -> str:
    """Return `text` with `table` between its markers.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no {BEGIN} followed by {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if there is a difference")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    options = parser.parse_args(arguments)
    text = options.readme.read_text()
    try:
        wanted = replace(text, build(options.results, options.readme.resolve().parent))
    except ValueError as error:
        parser.error(f"{options.readme}: {error}")
    if options.check:
        if text != wanted:
            print(f"{options.readme} differs from {options.results}: run python benchmarks/table.py")
        return int(text != wanted)
    replace_text(options.readme, wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
