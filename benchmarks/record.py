# SPDX-License-Identifier: MIT
"""A run as its file has it, written after every case, so that one that is killed leaves what it measured.

Machines with a GPU may be lent for minutes: a run can go on where an earlier one stopped, of the same commit and on the
same kind of machine.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import report
from benchmarks.ceilings import Ceilings

# What must be equal for one run to go on with the rows of another.
SAME_MACHINE = ("commit", "gpu", "cpu", "threads", "torch", "triton")
SAME_SETTINGS = ("device", "suite", "quick", "dtype", "backends", "budget", "verdicts", "tuned")
# They are compared with, and the case is whole without them.
YARDSTICKS = ("compiled", "clone", "fused", "flex")
LONGEST_TEXT = 1500  # of an error: Inductor's are pages
AnyCase = TypeVar("AnyCase")


def told(error: Exception) -> dict[str, str]:
    """An error's type and text; the error itself holds the tensors of its frames."""
    return {"error": type(error).__name__, "text": str(error)[:LONGEST_TEXT]}


def release(device: str) -> None:
    """Give back what a failed call held.

    Raises:
        RuntimeError: the device is lost; nothing can run on it in this process.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()


class Record:
    """What is known of a run so far.

    Args:
        path: the file; None writes none.
        machine, settings, ceilings: as in the file.
        cases: the names of all cases there are, of which fewer may be run.
        whole: whether the run may stand in the README once all have run.
    """

    def __init__(
        self,
        path: Path | None,
        machine: dict[str, Any],
        settings: dict[str, Any],
        cases: Sequence[str],
        whole: bool,
        ceilings: Ceilings | None = None,
    ) -> None:
        self.path, self.cases, self.whole = path, list(cases), whole
        self.machine, self.settings, self.ceilings = machine, settings, ceilings
        self.rows: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self.running: str | None = None

    def take_over(self, before: dict[str, Any]) -> str | None:
        """Keep what an earlier run has recorded; why not, where it is of something else.

        Commits that are not known are not known to be the same.
        """
        if self.machine["commit"] is None:
            return "this tree's commit is not known (TOKRED_COMMIT names it)"
        for part, names, mine in (("machine", SAME_MACHINE, self.machine), ("settings", SAME_SETTINGS, self.settings)):
            for name in names:
                if before[part].get(name) != mine[name]:
                    return f"its {name}: {before[part].get(name)}, here: {mine[name]}"
        wanted = set(self.cases)
        self.rows = [row for row in before["rows"] if row["case"] in wanted]
        self.failures = [failure for failure in before.get("failures", []) if failure["case"] in wanted]
        if before.get("running") in wanted:
            unseen = {"error": "Killed", "text": "the process ended while it ran"}
            self.failures.append({"case": before["running"], "provider": None, **unseen})
        self.machine["dirty"] = self.machine["dirty"] or before["machine"]["dirty"]
        limits = before["ceilings"]  # shares of one file are of the same ceilings
        self.ceilings = Ceilings(limits["copy_bytes_per_second"], limits["matmul_operations_per_second"])
        return None

    def left(self, cases: Sequence[AnyCase]) -> list[AnyCase]:
        """The cases that are to run: what failed before comes last, for it may fail the process again."""
        failed = {failure["case"] for failure in self.failures}
        left = [case for case in cases if not self.is_done(case.name)]  # type: ignore[attr-defined]
        return sorted(left, key=lambda case: case.name in failed)

    def is_done(self, case: str) -> bool:
        """Whether a case has rows, and nothing of it failed but yardsticks."""
        mine = [failure for failure in self.failures if failure["case"] == case]
        return any(row["case"] == case for row in self.rows) and all(f["provider"] in YARDSTICKS for f in mine)

    @property
    def complete(self) -> bool:
        """Whether the run may stand in the README: every case is done."""
        return self.whole and all(map(self.is_done, self.cases))

    def start(self, case: str) -> None:
        """What is known of the case is forgotten; the file says that it runs."""
        self.running = case
        self.rows = [row for row in self.rows if row["case"] != case]
        self.failures = [failure for failure in self.failures if failure["case"] != case]
        self.write()

    def end(self, rows: Sequence[dict[str, Any]], lost: dict[str, dict[str, str]]) -> None:
        """The running case's rows, and what its providers failed by."""
        self.rows += rows
        self.failures += [{"case": self.running, "provider": name, **error} for name, error in lost.items()]
        self.running = None
        self.write()

    def fail(self, error: dict[str, str]) -> None:
        """The running case failed as a whole."""
        self.failures.append({"case": self.running, "provider": None, **error})
        self.running = None
        self.write()

    def write(self) -> None:
        """Write the file, if there is to be one."""
        if self.path is None or self.ceilings is None:
            return
        copy, matmul = self.ceilings
        report.write_json(self.path, {
            "machine": self.machine,
            "settings": {**self.settings, "complete": self.complete},
            "ceilings": {"copy_bytes_per_second": copy, "matmul_operations_per_second": matmul},
            "running": self.running,
            "failures": self.failures,
            "rows": self.rows,
        })  # fmt: skip
