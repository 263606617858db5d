# SPDX-License-Identifier: MIT
"""The verdict of the self-check on one op of one backend."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PASSED, WRONG, CRASHED, HUNG, UNKNOWN, UNSUPPORTED = "passed", "wrong", "crashed", "hung", "unknown", "unsupported"
VERDICTS = (PASSED, WRONG, CRASHED, HUNG, UNKNOWN, UNSUPPORTED)


@dataclass
class Verdict:
    """The result of the self-check for one op of one backend.

    Attributes:
        verdict: "passed"; "wrong" (a result, or a write outside the output); "crashed" (an exception, or the end of
            the process); "hung" (over the time limit); "unknown" (the check itself could not run, for example for want
            of memory); "unsupported" (the backend has no such kernel here).
        reason: one sentence, or None if it passed.
        times_us: median time in microseconds by shape, such as "bfloat16 64x197x384"; empty if not timed.
    """

    verdict: str
    reason: str | None = None
    times_us: dict[str, float] = field(default_factory=dict)

    @property
    def is_passed(self) -> bool:
        """True if the kernel can be used."""
        return self.verdict == PASSED

    @classmethod
    def from_json(cls, value: Any) -> Verdict:
        """Rebuild a verdict from parsed JSON; raise ValueError unless that has the right structure."""
        if not (isinstance(value, dict) and value.keys() == {"verdict", "reason", "times_us"}):
            raise ValueError(f"a verdict must have verdict, reason and times_us, got {value!r}")
        times = value["times_us"]
        if value["verdict"] not in VERDICTS or not isinstance(value["reason"], (str, type(None))):
            raise ValueError(f"not a verdict: {value!r}")
        if not isinstance(times, dict) or not all(type(t) in (int, float) and 0 <= t < 1e12 for t in times.values()):
            raise ValueError(f"times_us must map shapes to microseconds, got {times!r}")
        return cls(value["verdict"], value["reason"], {str(name): float(time) for name, time in times.items()})


# By backend, then op.
Verdicts = dict[str, dict[str, Verdict]]
