# SPDX-License-Identifier: MIT
"""The text that says what was built, what the self-check found, and what each op uses."""

from __future__ import annotations

import torch

from tokred_kernels import backends
from tokred_kernels.backends import native, selfcheck
from tokred_kernels.backends.selection import DRAW, ranking
from tokred_kernels.backends.selfcheck.verdict import UNKNOWN, Verdict, Verdicts


def show_config() -> str:
    """Print (and return) what was built, and per op and device what `auto` uses and why; starts no self-check."""
    lines = [f"tokred_kernels with torch {torch.__version__}; backend: {backends.requested()}"]
    if native.MODULE is None:
        lines.append(f"native module: missing ({native.FAILURE})")
    else:
        lines.append(f"cpu kernels: {native.MODULE.cpu.instruction_set()}, {torch.get_num_threads()} threads")
        lines.append(f"cuda kernels: {native.MODULE.cuda_architectures or 'not built'}")
    lines.append("cpu:")
    for op in backends.OPS:
        chosen = backends._decide(op, backends.AUTO, torch.device("cpu"), torch.float32)
        reason = backends.can_run(op, "cpu", "cpu", torch.float32)
        lines.append(f"  {op:{_WIDTH}}  auto -> {chosen}" + (f"  (not cpu: {reason})" if reason else ""))
    if not torch.cuda.is_available():
        lines.append("gpu: none")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        lines.append(f"{device}, {torch.cuda.get_device_name(index)}:")
        lines += gpu_lines(device, selfcheck.cached(device))
    text = "\n".join(lines)
    print(text)
    return text


def gpu_lines(device: torch.device, verdicts: Verdicts) -> list[str]:
    """Return what `auto` uses for each op in bfloat16, why, and all verdicts."""
    if not verdicts:
        return [f"  not checked yet: the first use does so, or `{selfcheck.COMMAND} --device {device}`"]
    lines = []
    for op in backends.OPS:
        order = ranking(op, verdicts, torch.bfloat16, training=False)
        able = [b for b in order if b == "torch" or backends.can_run(op, b, device, torch.bfloat16) is None]
        timed = verdicts.get(able[0], {}).get(op, _NOTHING).times_us
        others = f"the fastest that passed, or within {DRAW - 1:.0%} of it" if timed else "the first that passed"
        lines.append(f"  {op:{_WIDTH}}  auto -> {able[0]}  ({others if len(able) > 1 else 'no other passed'})")
        lines += [f"      {line}" for line in verdict_lines(op, verdicts)]
    return lines


def verdict_lines(op: str, verdicts: Verdicts) -> list[str]:
    """Return a line for each backend: its verdict, its times, and the reason if it did not pass."""
    lines = []
    for backend, by_op in verdicts.items():
        if op in by_op:
            verdict = by_op[op]
            times = ", ".join(f"{shape} {time:g} us" for shape, time in verdict.times_us.items())
            lines.append(f"{backend:9}  {verdict.verdict:11}  {verdict.reason or times}".rstrip())
    return lines


_NOTHING = Verdict(UNKNOWN)
_WIDTH = max(map(len, backends.OPS))
