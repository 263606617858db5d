# SPDX-License-Identifier: MIT
"""Recorded runs as JSON files, written after every case, so that a killed run keeps what it has measured.

Machines with a GPU may be available for some minutes at a time. A run can resume an earlier one of the same commit,
the same kind of machine and the same settings.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.harness.rates import Rates
from tokred_kernels.files import replace_text

RESULTS = Path(__file__).resolve().parents[1] / "results"
SCHEMA = 2
SAME_MACHINE = ("commit", "gpu", "cpu", "threads", "torch", "triton")
SAME_SETTINGS = ("device", "suite", "quick", "backends", "budget", "verdicts", "tuned")
# A case is complete without these.
OPTIONAL = ("compiled", "clone", "fused", "flex")
LONGEST_TEXT = 1500  # characters of an error: Inductor's fill pages

Row = dict[str, Any]
Failures = dict[str, dict[str, str]]
AnyCase = TypeVar("AnyCase")


def default_path(date: str, device: str, suite: str) -> Path:
    """Return benchmarks/results/<date>-<device>-<suite>.json."""
    return RESULTS / f"{date[:10]}-{device}-{suite}.json"


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a run, with one row in each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in result["rows"])
    rest = {"schema": SCHEMA, **{key: value for key, value in result.items() if key != "rows"}}
    head = json.dumps(rest, indent=1, allow_nan=False).removesuffix("\n}")
    replace_text(path, f'{head},\n "rows": [\n{rows}\n ]\n}}\n')


def read_json(path: Path) -> dict[str, Any]:
    """Read a run.

    Raises:
        ValueError: the file has another schema.
    """
    result = json.loads(path.read_text())
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {result.get('schema')}")
    return result


def error_facts(error: Exception) -> dict[str, str]:
    """Return the type and text of an error. The error itself would keep the tensors of its frames alive."""
    return {"error": type(error).__name__, "text": str(error)[:LONGEST_TEXT]}


def release(device: str) -> None:
    """Free what a failed call held.

    Raises:
        RuntimeError: the device is lost, so that this process cannot use it any more.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()


class Record:
    """A run so far.

    Args:
        path: the file, or None to write none.
        machine, settings: facts for the file.
        cases: the names of all cases of the suite; a run may have fewer.
        whole: whether the README can show the run once every case is done.
    """

    def __init__(
        self, path: Path | None, machine: dict[str, Any], settings: dict[str, Any], cases: Sequence[str], whole: bool
    ) -> None:
        self.path, self.cases, self.whole = path, list(cases), whole
        self.machine, self.settings = machine, settings
        self.rates: Rates | None = None
        self.rows: list[Row] = []
        self.failures: list[dict[str, Any]] = []
        self.running: str | None = None

    def resume(self, before: dict[str, Any]) -> str | None:
        """Take over the rows of an earlier run, or return the reason against it."""
        if self.machine["commit"] is None:
            return "the commit of this tree is unknown (set TOKRED_COMMIT)"
        for part, names, mine in (("machine", SAME_MACHINE, self.machine), ("settings", SAME_SETTINGS, self.settings)):
            for name in names:
                if before[part].get(name) != mine[name]:
                    return f"its {name} is {before[part].get(name)}, here {mine[name]}"
        self.rows = [row for row in before["rows"] if row["case"] in self.cases]
        self.failures = [failure for failure in before["failures"] if failure["case"] in self.cases]
        if before["running"] in self.cases:
            killed = {"error": "Killed", "text": "the process ended during this case"}
            self.failures.append({"case": before["running"], "provider": None, **killed})
        self.machine["dirty"] = self.machine["dirty"] or before["machine"]["dirty"]
        self.rates = Rates(**before["rates"])
        return None

    def left(self, cases: Sequence[AnyCase]) -> list[AnyCase]:
        """Return the cases to run. Those that failed before come last, as they may end the process again."""
        failed = {failure["case"] for failure in self.failures}
        left = [case for case in cases if not self.is_done(case.name)]  # type: ignore[attr-defined]
        return sorted(left, key=lambda case: case.name in failed)

    def is_done(self, case: str) -> bool:
        """Return whether a case has rows and nothing failed in it except optional providers."""
        failed = (failure["provider"] for failure in self.failures if failure["case"] == case)
        return any(row["case"] == case for row in self.rows) and all(name in OPTIONAL for name in failed)

    @property
    def complete(self) -> bool:
        """True if the README can show the run."""
        return self.whole and all(map(self.is_done, self.cases))

    def start(self, case: str) -> None:
        """Forget what is known of the case, and note that it runs."""
        self.running = case
        self.rows = [row for row in self.rows if row["case"] != case]
        self.failures = [failure for failure in self.failures if failure["case"] != case]
        self.write()

    def end(self, rows: Sequence[Row], failures: dict[str | None, dict[str, str]]) -> None:
        """Add the rows of the running case, and its failures by provider; None stands for the whole case."""
        self.rows += rows
        self.failures += [{"case": self.running, "provider": name, **error} for name, error in failures.items()]
        self.running = None
        self.write()

    def write(self) -> None:
        """Write the file, if there is one."""
        if self.path is None or self.rates is None:
            return
        write_json(self.path, {
            "machine": self.machine,
            "settings": {**self.settings, "complete": self.complete},
            "rates": self.rates._asdict(),
            "running": self.running,
            "failures": self.failures,
            "rows": self.rows,
        })  # fmt: skip
