# SPDX-License-Identifier: MIT
"""Times the PyTorch baseline, its compiled form and every backend in turns, in one run, on the same inputs.

python benchmarks/run.py --device cpu --quick            the CPU, in under two minutes
python benchmarks/run.py --json                          everything, recorded in benchmarks/results/
python benchmarks/run.py --op unmerge --backend cpu,reference
python benchmarks/run.py --device cuda --minutes 8 --resume gpu.json      repeat it until the run is complete

On a GPU, the self-check runs first if it is due; kernels that did not pass it are named and not timed. A failure is
recorded, and the other cases still run. A case that hangs on a GPU ends the process, and --resume runs it last. The
exit status is 1 if anything failed, and 0 otherwise, even if --minutes ended the run before it was complete.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from pathlib import Path
from typing import Any

# Read when torch is imported: otherwise the profiler, which measures memory, prints a line at each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

if not __package__:  # run as a file
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.families import CASES, MODEL_CASES, ModelCase, models
from benchmarks.harness import machine, measure, providers, rates, records
from benchmarks.harness.arguments import DEVICE_HELP, chosen_device, chosen_names
from benchmarks.harness.case import KERNELS, Case
from benchmarks.harness.records import Record, Row
from benchmarks.harness.report import number, verdict
from benchmarks.harness.timing import FULL, FULL_GPU, QUICK
from tokred_kernels import backends

SUITES = ("micro", "model")
TO_DEFAULT_PATH = ""  # the value of --json without a path
# Seconds. A kernel that never ends blocks its process for good, so the process must end for other cases to run.
LONGEST_CASE = {"cuda": 240.0}


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    names = chosen_names(parser, "--backend", options.backend, (*backends.BACKENDS, backends.AUTO))
    ops = chosen_names(parser, "--op", options.op, tuple(KERNELS))
    device = chosen_device(parser, options.device)
    if ops and options.suite == "model":
        parser.error("--op chooses among the cases of --suite micro; the model suite has no ops")
    if backends.AUTO in names and options.suite == "micro":
        parser.error("--backend auto needs --suite model: it may choose several backends for one model")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes}")
    deadline = time.monotonic() + 60 * options.minutes if options.minutes is not None else float("inf")
    of_suite = _cases(options, device)
    cases = [case for case in of_suite if not ops or (isinstance(case, Case) and case.op in ops)]
    if not cases:
        parser.error("no case is left; drop --quick or --op, or choose another device")
    # Triton's interpreter on a CPU is for correctness: it runs only if --backend names it.
    chosen = names or [name for name in backends.BACKENDS if not (device == "cpu" and name == "triton")]
    verdicts = machine.verdicts(device)
    failed = machine.failures(verdicts)
    for (backend, _), reason in failed.items():
        print(f"not timed: {backend}: {reason}")
    for name in names:
        reasons = {_reason_against(case, name, failed) for case in cases}
        if None not in reasons:
            parser.error(f"--backend {name}: {reasons.pop()}")

    budget = QUICK if options.quick else FULL_GPU if device == "cuda" else FULL
    settings = measure.Settings(budget, chosen, options.quick, failed)
    facts = machine.describe()
    print(f"{facts['gpu'] if device == 'cuda' else facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, "
          f"commit {(facts['commit'] or 'unknown')[:9]}{' with changes' if facts['dirty'] else ''}")  # fmt: skip
    suite = options.suite or "all"
    path = None
    if options.json is not None or options.resume:
        path = Path(options.json or options.resume or records.default_path(facts["date"], device, suite))
    recorded = {
        "device": device, "suite": suite, "quick": options.quick, "backends": chosen, "budget": budget._asdict(),
        # Neither is part of the commit, and both decide which kernel runs.
        "verdicts": {name: {op: found.verdict for op, found in of.items()} for name, of in verdicts.items()},
        "tuned": machine.tuned_digest() if device == "cuda" else None,
    }  # fmt: skip
    # The README shows complete runs of all cases, in parts or at once, with some kernel.
    whole = not options.quick and chosen != ["reference"]
    record = Record(path, facts, recorded, [case.name for case in of_suite], whole)
    if options.resume and Path(options.resume).exists():
        _resume(parser, record, Path(options.resume))
    record.rates = record.rates or rates.measure(device, {case.dtype for case in of_suite})
    print(f"copy {record.rates.copy / 1e9:.1f} GB/s; matmul " + ", ".join(
        f"{dtype} {rate / 1e12:.2f} TFLOP/s" for dtype, rate in record.rates.matmul.items()))  # fmt: skip

    for case in record.left(cases):
        if time.monotonic() >= deadline:
            print(f"stopped after {options.minutes:g} minutes: {len(record.left(cases))} of {len(cases)} cases left")
            break
        if not _run(case, record, settings):
            print("stopped: this process has lost the device", file=sys.stderr)
            break
    record.write()
    if path:
        print(f"written: {path}{'' if record.complete or not whole else ', not complete'}")
    if record.failures:
        print(f"error: {len(record.failures)} failed:", file=sys.stderr)
        for failure in record.failures:
            print(f"  {_failure(failure)}", file=sys.stderr)
    return int(bool(record.failures))


def _resume(parser: argparse.ArgumentParser, record: Record, path: Path) -> None:
    try:
        reason = record.resume(records.read_json(path))
    except (ValueError, KeyError) as error:
        parser.error(f"--resume {path}: {error}")
    if reason:
        print(f"{path} is not resumed: {reason}")
    else:
        print(f"{path} has {sum(map(record.is_done, record.cases))} of {len(record.cases)} cases")


def _run(case: Case | ModelCase, record: Record, settings: measure.Settings) -> bool:
    """Measure and record a case. Return False if the device is lost."""
    print(case.name, flush=True)
    record.start(case.name)
    if case.device in LONGEST_CASE:
        faulthandler.dump_traceback_later(LONGEST_CASE[case.device], exit=True, file=sys.__stderr__)
    try:
        if isinstance(case, Case):
            rows, failures = measure.measure(case, settings, record.rates)
        else:
            rows, failures = models.measure(case, settings)
    except Exception as error:  # of torch, a compiler or a driver
        rows, failures = [], {None: records.error_facts(error)}
    finally:
        faulthandler.cancel_dump_traceback_later()
    record.end(rows, failures)
    for row in rows:
        print("  " + _line(row), flush=True)
    for failure in record.failures:
        if failure["case"] == case.name:
            print("  failed: " + _failure(failure), file=sys.stderr, flush=True)
    try:
        records.release(case.device)
    except RuntimeError as lost_device:
        print(f"  {lost_device}", file=sys.stderr)
        return False
    return True


def _failure(failure: dict[str, Any]) -> str:
    who = f"{failure['case']}: {failure['provider']}" if failure["provider"] else failure["case"]
    return f"{who}: {failure['error']}: {failure['text'].strip().partition(chr(10))[0]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help=DEVICE_HELP)
    parser.add_argument("--suite", choices=SUITES, help="default: both")
    parser.add_argument("--op", help=f"some of {', '.join(KERNELS)}, separated by commas")
    parser.add_argument("--backend", help=f"some of {', '.join(backends.BACKENDS)}; default: all that work")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds, and few compiled baselines")
    parser.add_argument("--json", nargs="?", const=TO_DEFAULT_PATH, metavar="PATH",
                        help="record the run; default path: in benchmarks/results/")  # fmt: skip
    parser.add_argument("--resume", metavar="PATH", help="continue the run recorded there, if it has the same machine, "
                        "commit and settings; else start it anew. Records there unless --json is given")  # fmt: skip
    parser.add_argument("--minutes", type=float, help="start no further case after this time")
    return parser


def _cases(options: argparse.Namespace, device: str) -> list[Case | ModelCase]:
    cases: list[Case | ModelCase] = []
    if options.suite != "model":
        cases += CASES
    if options.suite != "micro":
        cases += MODEL_CASES
    return [case for case in cases if case.device == device and (case.quick or not options.quick)]


def _reason_against(case: Case | ModelCase, backend: str, failed: providers.Failed) -> str | None:
    if isinstance(case, Case):
        return providers.reason_against(case, backend, failed)
    return models.reason_against(case, backend, failed)


def _line(row: Row) -> str:
    text = f"{row['provider']:10} {number(row['median_us']):>9} us"
    if row["suite"] == "model":
        text += f"  {number(row['images_per_second'])} images/s  {row['speed_ratio']:.2f}x"
        text += f"  {row['flops_efficiency']:.2f} of the FLOPs ratio"
    elif row["speedup"] is not None:
        text += f"  {number(row['speedup'])}x the baseline"
    targets = (f"{_judged(target)}: {verdict(target['met'])}" for target in row["targets"])
    return "  ".join((text, *targets))


def _judged(target: dict[str, Any]) -> str:
    return f"{target['measure']} {number(target['value'])}, bound {number(target['bound'])}"


if __name__ == "__main__":
    sys.exit(main())
