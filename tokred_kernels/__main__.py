# SPDX-License-Identifier: MIT
"""The command line: `python -m tokred_kernels check` runs the self-check, `info` prints what is known."""

from __future__ import annotations

import argparse
import itertools
import json
import sys

import torch

from tokred_kernels import backends
from tokred_kernels.backends import selfcheck
from tokred_kernels.backends.configuration import show_config, verdict_lines
from tokred_kernels.backends.selfcheck.verdict import PASSED, UNSUPPORTED, Verdict


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return 0, or 1 if a kernel did not pass. Bad input exits with 2."""
    parser = argparse.ArgumentParser(prog="python -m tokred_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print what was built, the verdicts, and what each op uses")
    check = commands.add_parser(
        "check", help="check the kernels on a device now, time them on a GPU, keep the verdicts"
    )
    check.add_argument("--device", help='"cuda:0", or "cpu"; default: the GPU if there is one')
    check.add_argument("--backend", help="check only this backend")
    check.add_argument("--op", help="check only this op")
    check.add_argument("--deep", action="store_true", help="run many more cases")
    check.add_argument("--json", action="store_true", help="print the verdicts as JSON on the last line")
    options = parser.parse_args(arguments)
    try:
        backends.requested()
    except ValueError as error:
        parser.error(str(error))
    if options.command == "info":
        show_config()
        return 0
    return _check(options, check)


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    device = _device(options.device, parser)
    known = selfcheck.CHECKED[device.type]
    if options.backend is not None and options.backend not in known:
        parser.error(f"--backend must be one of {', '.join(known)} on {device}, got {options.backend!r}")
    if options.op is not None and options.op not in backends.OPS:
        parser.error(f"--op must be one of {', '.join(backends.OPS)}, got {options.op!r}")
    ops = [options.op] if options.op else backends.OPS
    chosen = [options.backend] if options.backend else known

    def progress(task: selfcheck.Task, backend: str, verdict: Verdict) -> None:
        part = f" in {task.dtype}" if task.dtype else ""
        print(f"{'timed' if task.times else 'checked'} {task.op} on {backend}{part}: {verdict.verdict}", flush=True)

    try:
        facts = selfcheck.cache.facts(device)
        with selfcheck.cache.lock(facts, lambda: print("waiting for another check on this machine", flush=True)):
            found = selfcheck.check(device, itertools.product(chosen, ops), progress, deep=options.deep)
            selfcheck.cache.write(facts, found)
    except (selfcheck.cache.Unusable, ValueError) as error:
        parser.error(str(error))
    results = [verdict.verdict for by_op in found.values() for verdict in by_op.values()]
    counts = ", ".join(f"{results.count(name)} {name}" for name in dict.fromkeys(sorted(results)))
    print()
    for op in ops:
        print("\n".join(f"{op:26}{line}" for line in verdict_lines(op, found)))
    print(f"{facts['device']}: {counts}")
    if options.json:
        print(json.dumps(found, default=vars))
    return 0 if set(results) <= {PASSED, UNSUPPORTED} else 1


def _device(name: str | None, parser: argparse.ArgumentParser) -> torch.device:
    """Return the device to check; exit if it does not exist."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f'--device must be "cpu", "cuda" or "cuda:INDEX", got {name!r}')
    if device.type not in selfcheck.CHECKED:
        parser.error(f'--device must be "cpu", "cuda" or "cuda:INDEX", got {name!r}')
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        parser.error(f"--device {name}: torch finds {count} GPU{'s' if count != 1 else ''} here")
    return torch.device("cuda", device.index or 0)


if __name__ == "__main__":
    sys.exit(main())
