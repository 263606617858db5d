# SPDX-License-Identifier: MIT
"""Writes the README's table of results from the newest complete run of each device, so that no figure is typed.

python benchmarks/table.py            rewrites the part between the markers
python benchmarks/table.py --check    fails where the README says anything else than the results
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the folder above holds this package, and comes after what is installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import report
from benchmarks.cases import CASES, Case, Target
from benchmarks.model_cases import MODEL_CASES, ModelCase
from tokred_kernels.files import replace_text

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
DEVICES = {"cpu": "CPU", "cuda": "NVIDIA GPU (targets are for an H100)"}
ABSENT = "not measured yet"
UNMEASURED = {"cpu": "Not measured yet.", "cuda": "Not measured yet: no GPU at hand."}
OP_COLUMNS = "Op|Shape|Published|Compiled|Beside|Ours|Reached|Target|Met"
MODEL_COLUMNS = "Model, ToMe|Unpatched, images/s|Patched, images/s|Speed|FLOPs|Speed over FLOPs|Target|Met"
DTYPE_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Who else is timed, and how the table calls them.
BESIDE = {"clone": "`x.clone()`", "fused": "torch's attention", "flex": "FlexAttention"}
REACHED = {
    "speedup_published": "{:.1f}x",
    "speedup_compiled": "{:.1f}x",
    "speedup_reference": "{:.1f}x",
    "copy_share": "{:.0%}",
    "matmul_share": "{:.0%}",
    "flops_efficiency": "{:.2f}",
    "times_clone": "{:.2f}x",
    "times_fused": "{:.2f}x",
    "median_us": "{:.1f} us",
    "peak_share_published": "{:.0%}",
    "working_share_published": "{:.0%}",
    "peak_per_token": "{:.0f} B",
}

NOTE = """Medians, all providers in turns in one run, after a check that their results agree. Published: the chain of
torch ops of the authors' code; for LookupViT, of which there is none, that of the paper's equations. torch's attention
is its fused one with neither sizes, policy nor importance, FlexAttention has the same sizes. `x.clone()` copies the
tokens and does no more: what must read and write them all can hardly be faster, so where the published chain takes less
than the target's multiple of it, the target is out of reach on that machine. Where the number of merged tokens is
adaptive, it is read back to the host: "compiled" is then compiled in parts. Peak memory is that of a process of its
own, what C++ code takes included. On a GPU these are GPU times of replayed CUDA graphs, or, where a read back forbids
these, of eager calls; the files have eager times of all. So it is with models: unpatched and patched are judged by
graphs of the whole forward pass, both, since the host cannot issue late layers as fast as a GPU runs them."""


class Run:
    """One recorded run, by case and provider."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.result = report.read_json(path)
        self.settings: dict[str, Any] = self.result["settings"]
        self.machine: dict[str, Any] = self.result["machine"]

    def row(self, case: str, provider: str) -> report.Row | None:
        """The row of one provider."""
        rows = self.result["rows"]
        return next((row for row in rows if (row["case"], row["provider"]) == (case, provider)), None)

    def ours(self, case: str) -> report.Row | None:
        """The fastest row of those that targets are asked of."""
        kernels = ("cpu", "cuda", "triton", "auto")
        rows = [row for row in self.result["rows"] if row["case"] == case and row["provider"] in kernels]
        return min(rows, key=lambda row: row["median_us"], default=None)

    def describe(self, root: Path) -> str:
        """The machine, and the file that says so."""
        m = self.machine
        name = f"{m['gpu']}, driver {m['driver']}" if self.settings["device"] == "cuda" else m["cpu"]
        threads = f", {m['threads']} threads" if self.settings["device"] == "cpu" else ""
        changes = {True: " and changes", False: "", None: ", not known whether with changes"}[m["dirty"]]
        commit = (m["commit"] or "unknown")[:9] + changes
        path = self.path.resolve()
        link = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        return f"{name}{threads}, torch {m['torch']}, commit {commit}, {m['date'][:10]}: [{path.name}]({link})"


def newest(folder: Path, device: str, suite: str, complete: bool = True) -> Run | None:
    """The newest run of all of a suite's cases on a device; without `complete`, of any of them.

    Complete is a run whose every case has its rows, and of which nothing failed but yardsticks.
    """
    runs = [Run(path) for path in sorted(folder.glob("*.json"))]
    fitting = [
        run for run in runs
        if (run.settings["complete"] or not complete)
        and run.settings["device"] == device and run.settings["suite"] in (suite, "all")
    ]  # fmt: skip
    return max(fitting, key=lambda run: run.machine["date"], default=None)


def build(folder: Path, root: Path) -> str:
    """The Markdown that stands between the markers."""
    parts = []
    for device, title in DEVICES.items():
        micro, model = newest(folder, device, "micro"), newest(folder, device, "model")
        parts.append(f"**{title}**")
        files = dict.fromkeys(run.describe(root) for run in (micro, model) if run is not None)
        parts += files or [f"{UNMEASURED[device]} What is asked:"]
        parts += _tables(device, micro, model)
    parts.append(NOTE)
    return "\n\n".join(filter(None, parts))


def _tables(device: str, micro: Run | None, model: Run | None) -> list[str]:
    """The tables of ops and of models; of what no run has measured, the targets alone."""
    ops = [(case, target) for case in CASES if case.device == device for target in case.targets]
    models = [case for case in MODEL_CASES if case.device == device and (model or case.targets)]
    if micro:
        tables = [_rows(OP_COLUMNS, [_op_cells(case, target, micro) for case, target in ops])]
    else:
        tables = [_rows(f"Op|Shape|Target, {ABSENT}", [[_op(case), _shape(case), str(target)] for case, target in ops])]
    if models and model:
        tables.append(_rows(MODEL_COLUMNS, [_model_cells(case, model) for case in models]))
    elif models:
        tables.append(_rows(f"Model, ToMe|Target, {ABSENT}", [[_model(case), _targets(case)] for case in models]))
    return tables


def _op(case: Case) -> str:
    return f"`{case.op}`" + (", what a call costs the host" if case.host else "")


def _shape(case: Case) -> str:
    return f"{case.label}, {DTYPE_NAMES[case.dtype]}"


def _model(case: ModelCase) -> str:
    return f"{case.model}, batch {case.batch}, r {case.r}, {DTYPE_NAMES[case.dtype]}"


def _targets(case: ModelCase) -> str:
    return "; ".join(map(str, case.targets)) or "-"


def _op_cells(case: Case, target: Target, run: Run) -> list[str]:
    ours = run.ours(case.name)
    if ours is None:
        return [_op(case), _shape(case), "-", "-", "-", "-", "-", str(target), ABSENT]
    # A target that the recorded run did not judge (it came later) is not judged here either.
    judged = next((t for t in ours["targets"] if t["target"] == str(target)), None)
    value = judged["value"] if judged else None
    reached = "-" if value is None else REACHED[target.measure].format(value)
    met = report.verdict(judged["met"] if judged else None)
    times = [_time(run.row(case.name, name)) for name in ("published", "compiled")]
    beside = ((title, run.row(case.name, name)) for name, title in BESIDE.items())
    others = "; ".join(f"{title} {_time(row)}" for title, row in beside if row is not None) or "-"
    return [_op(case), _shape(case), *times, others, f"{_time(ours)} ({ours['provider']})", reached, str(target), met]


def _model_cells(case: ModelCase, run: Run) -> list[str]:
    ours, plain = run.ours(case.name), run.row(case.name, "unpatched")
    if ours is None or plain is None:
        return [_model(case), "-", "-", "-", "-", "-", _targets(case), ABSENT]
    met = "; ".join(report.verdict(t["met"]) for t in ours["targets"]) or "-"
    return [
        _model(case),
        # By the same clock as the patched model's; files of before 2026-11-22 have but one.
        report.number(ours.get("unpatched_images_per_second", plain["images_per_second"])),
        f"{report.number(ours['images_per_second'])} ({ours['provider']})",
        f"{ours['speed_ratio']:.2f}x", f"{ours['flops_ratio']:.2f}x", f"{ours['flops_efficiency']:.2f}",
        _targets(case), met,
    ]  # fmt: skip


def _time(row: report.Row | None) -> str:
    if row is None:
        return "-"
    microseconds = row["median_us"]
    return f"{report.number(microseconds)} us" if microseconds < 1000 else f"{report.number(microseconds / 1000)} ms"


def _rows(header: str, lines: list[list[str]]) -> str:
    return report.table(header, lines).rstrip()


def replace(text: str, table: str) -> str:
    """`text` with `table` between its markers.

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
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where it would change")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    text = options.readme.read_text()
    try:
        wanted = replace(text, build(options.results, options.readme.resolve().parent))
    except ValueError as error:
        parser.error(f"{options.readme}: {error}")
    if options.check:
        if text != wanted:
            print(f"{options.readme} is not what {options.results} says: run python benchmarks/table.py")
        return int(text != wanted)
    replace_text(options.readme, wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
