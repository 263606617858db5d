# SPDX-License-Identifier: MIT
"""Times the PyTorch baseline, its compiled form and every backend in turns, in one run, on one set of inputs.

python benchmarks/run.py --device cpu --quick                 the CPU, in under two minutes
python benchmarks/run.py --json                               everything, recorded in benchmarks/results/
python benchmarks/run.py --op unmerge --backend cpu,reference --markdown --plot speed.png
python benchmarks/run.py --device cuda --minutes 8 --resume gpu.json      some minutes at a time, until it is complete

Runs on the GPU if there is one. There the self-check runs first if it is due, and kernels that did not pass it are
named and not timed. A failure is recorded with the rows, and the other cases still run. A case that hangs on a GPU ends
the run, and --resume runs it last. Exits with 1 where anything failed; a run that --minutes has cut short, and in which
nothing failed, exits with 0, and its file says that it is not complete.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import os
import sys
import time
from pathlib import Path
from typing import Any

# The profiler that counts launches would print a line at each start and stop. Read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

if not __package__:  # run as a file: the folder above holds this package, and comes after what is installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import ceilings, footprint, machine, micro, model_suite, providers, report, resident
from benchmarks.cases import CASES, OPS, Case
from benchmarks.model_cases import MODEL_CASES, ModelCase
from benchmarks.record import Record, release, told
from benchmarks.timing import FULL, FULL_GPU, QUICK
from tokred_kernels import backends

SUITES = ("micro", "model")
DTYPES = ("float32", "float16", "bfloat16")
TO_DEFAULT_PATH = ""  # what --json without a path is
# In seconds. A kernel that never ends holds its process for good, so that it must end for the others to be measured.
LONGEST_CASE = {"cuda": 240.0}


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    names = _list(parser, "--backend", options.backend, (*backends.BACKENDS, backends.AUTO))
    ops = _list(parser, "--op", options.op, OPS)
    device = machine.chosen_device(parser, options.device)
    if ops and options.suite == "model":
        parser.error("--op chooses among the cases of --suite micro; the model suite has no ops")
    if backends.AUTO in names and options.suite == "micro":
        parser.error("--backend auto is for models, whose ops it may give to several; --suite micro times one by one")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes}")
    deadline = time.monotonic() + 60 * options.minutes if options.minutes is not None else float("inf")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)

    cases = _cases(options, device, ops)
    if not cases:
        parser.error("no case is left; drop --quick or --op, or try another device")
    # Triton's interpreter is for correctness: on a CPU it runs only if it is named.
    chosen = names or [b for b in backends.BACKENDS if not (device == "cpu" and b == "triton")]
    verdicts = machine.verdicts(device)
    failed = machine.failures(verdicts)
    for (backend, _), reason in failed.items():
        print(f"not timed: {backend}: {reason}")
    for name in names:
        reasons = {_reason_against(case, name, failed) for case in cases}
        if None not in reasons:
            parser.error(f"--backend {name}: {reasons.pop()}")

    budget = QUICK if options.quick else FULL_GPU if device == "cuda" else FULL
    settings = micro.Settings(budget, chosen, options.quick, failed)
    description = machine.describe()
    print(f"{description['gpu'] if device == 'cuda' else description['cpu']}, {description['threads']} threads, "
          f"torch {description['torch']}, commit {(description['commit'] or 'unknown')[:9]}"
          f"{' and changes' if description['dirty'] else ''}")  # fmt: skip
    suite = options.suite or "all"
    path = None
    if options.json is not None or options.resume:
        path = Path(options.json or options.resume or report.default_path(description["date"], device, suite))
    recorded = {
        "device": device, "suite": suite, "quick": options.quick, "dtype": options.dtype, "backends": chosen,
        "budget": budget._asdict(),
        # Neither is part of the commit, and both decide which kernel runs, and how.
        "verdicts": {name: {op: found.verdict for op, found in of.items()} for name, of in verdicts.items()},
        "tuned": machine.tuned_digest() if device == "cuda" else None,
        "memory": footprint.GPU_MEMORY if device == "cuda" else footprint.CPU_MEMORY,
        "resident_memory": resident.MEMORY,
    }  # fmt: skip
    # Only a run of all cases as they are, in parts or at once, and of some kernel, may stand in the README.
    whole = not (options.quick or options.dtype) and chosen != ["reference"]
    record = Record(path, description, recorded, [case.name for case in _cases(options, device, [])], whole)
    if options.resume:
        _resume(parser, record, Path(options.resume))
    limits = record.ceilings = record.ceilings or ceilings.measure(device, {case.dtype for case in cases})
    print(f"copy {limits.copy / 1e9:.1f} GB/s; products " + ", ".join(
        f"{dtype} {rate / 1e12:.2f} TFLOP/s" for dtype, rate in limits.matmul.items()))  # fmt: skip

    for case in record.left(cases):
        if time.monotonic() >= deadline:
            print(f"stopped after {options.minutes:g} minutes: {len(record.left(cases))} of {len(cases)} cases left")
            break
        if not _run(case, record, settings):
            print("stopped: the device is lost to this process", file=sys.stderr)
            break
    record.write()
    if path:
        print(f"written: {path}{'' if record.complete or not whole else ', not complete'}")
    rows = record.rows
    if options.plot:
        report.plot(rows, Path(options.plot))
        print(f"written: {options.plot}")
    if options.markdown:
        print("\n" + report.markdown(rows))
    if record.failures:
        print(f"error: {len(record.failures)} failed:", file=sys.stderr)
        for failure in record.failures:
            print(f"  {_failure(failure)}", file=sys.stderr)
    return int(bool(record.failures))


def _resume(parser: argparse.ArgumentParser, record: Record, path: Path) -> None:
    """Take over what the file has, if it has; say what was done."""
    if not path.exists():
        return
    try:
        reason = record.take_over(report.read_json(path))
    except (ValueError, KeyError) as error:
        parser.error(f"--resume {path}: {error}")
    if reason:
        print(f"{path} is not resumed: {reason}")
    else:
        done = sum(map(record.is_done, record.cases))
        print(f"{path} has {done} of {len(record.cases)} cases")


def _run(case: Case | ModelCase, record: Record, settings: micro.Settings) -> bool:
    """Measure a case and record it; False where the device can no longer be used."""
    print(case.name, flush=True)
    record.start(case.name)
    error = None
    if case.device in LONGEST_CASE:
        faulthandler.dump_traceback_later(LONGEST_CASE[case.device], exit=True, file=sys.__stderr__)
    try:
        if isinstance(case, Case):
            rows, lost = micro.measure(case, settings, record.ceilings)
        else:
            rows, lost = model_suite.measure(case, settings)
    except Exception as whatever:  # of torch, a compiler, a driver; it is recorded
        error = told(whatever)
    finally:
        faulthandler.cancel_dump_traceback_later()
    if error is None:
        record.end(rows, lost)
        for row in rows:
            print("  " + _line(row), flush=True)
    else:
        record.fail(error)
    for failure in record.failures:
        if failure["case"] == case.name:
            print("  failed: " + _failure(failure), file=sys.stderr, flush=True)
    try:
        release(case.device)
    except RuntimeError as lost_device:
        print(f"  {lost_device}", file=sys.stderr)
        return False
    return True


def _failure(failure: dict[str, Any]) -> str:
    who = f"{failure['case']}: {failure['provider']}" if failure["provider"] else failure["case"]
    return f"{who}: {failure['error']}: {failure['text'].strip().partition(chr(10))[0]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help=machine.DEVICE_HELP)
    parser.add_argument("--suite", choices=SUITES, help="default: both")
    parser.add_argument("--op", help=f"one or more of {', '.join(OPS)}, with commas between")
    parser.add_argument("--backend", help=f"one or more of {', '.join(backends.BACKENDS)}; default: all that can")
    parser.add_argument("--dtype", choices=DTYPES, help="all cases in this dtype, without their targets")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--quick", action="store_true", help="few cases and rounds, compiling few chains")
    parser.add_argument("--json", nargs="?", const=TO_DEFAULT_PATH, metavar="PATH",
                        help="record the run; without a path in benchmarks/results/")  # fmt: skip
    parser.add_argument(
        "--resume",
        metavar="PATH",
        help="go on with the run recorded there, if it is of this machine, commit and settings: keep "
        "the cases it has; else begin it anew. Records there unless --json names another file",
    )
    parser.add_argument("--minutes", type=float, help="start no case after so many")  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="print the rows as a Markdown table")
    parser.add_argument("--plot", metavar="PATH", help="draw the ratios (needs matplotlib)")
    return parser


def _list(parser: argparse.ArgumentParser, option: str, text: str | None, known: tuple[str, ...]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()] if text else []
    for name in names:
        if name not in known:
            parser.error(f"{option} must name some of {', '.join(known)}, got {name!r}")
    return names


def _cases(options: argparse.Namespace, device: str, ops: list[str]) -> list[Case | ModelCase]:
    cases: list[Case | ModelCase] = []
    if options.suite != "model":
        cases += [case for case in CASES if not ops or case.op in ops]
    if options.suite != "micro" and not ops:
        cases += MODEL_CASES
    cases = [case for case in cases if case.device == device and (case.quick or not options.quick)]
    if options.dtype:
        changed = (dataclasses.replace(case, dtype=options.dtype, targets=()) for case in cases)
        cases = list(dict.fromkeys(changed))  # cases that differed in dtype alone have become one
    return cases


def _reason_against(case: Case | ModelCase, backend: str, failed: providers.Failed) -> str | None:
    module = providers if isinstance(case, Case) else model_suite
    return module.reason_against(case, backend, failed)


def _line(row: dict[str, Any]) -> str:
    text = f"{row['provider']:10} {report.number(row['median_us']):>9} us"
    if row["suite"] == "model":
        text += f"  {report.number(row['images_per_second'])} images/s  {row['speed_ratio']:.2f}x"
        text += f"  {row['flops_efficiency']:.2f} of the FLOPs ratio"
    elif row["speedup_published"] is not None:
        text += f"  {report.number(row['speedup_published'])}x published"
    verdicts = report.verdicts(row)
    return text if verdicts == "-" else f"{text}  {verdicts}"


if __name__ == "__main__":
    sys.exit(main())
