# SPDX-License-Identifier: MIT
"""Times the published chain, its compiled form and every backend side by side, in one run, on one set of inputs.

python benchmarks/run.py --quick                              the CPU, in under two minutes
python benchmarks/run.py --device cuda --json                 everything on a GPU, recorded in benchmarks/results/
python benchmarks/run.py --op unmerge --backend cpu,reference --markdown --plot speed.png
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

# The profiler that counts launches would print a line at each start and stop. Read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

if not __package__:  # run as a file: the folder above holds this package, and comes after what is installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import ceilings, footprint, machine, micro, model_suite, providers, report, resident
from benchmarks.agreement import Disagreement
from benchmarks.cases import CASES, MODEL_CASES, OPS, Case, ModelCase
from benchmarks.timing import FULL, QUICK
from tokred_kernels import backends

SUITES = ("micro", "model")
DTYPES = ("float32", "float16", "bfloat16")
TO_DEFAULT_PATH = ""  # what --json without a path is


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    names = _list(parser, "--backend", options.backend, backends.BACKENDS)
    ops = _list(parser, "--op", options.op, OPS)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if ops and options.suite == "model":
        parser.error("--op chooses among the cases of --suite micro; the model suite has no ops")
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)

    cases = _cases(options, device, ops)
    if not cases:
        parser.error("no case is left; drop --quick or --op, or try another device")
    # Triton's interpreter is for correctness: on a CPU it runs only if it is named.
    chosen = names or [b for b in backends.BACKENDS if not (device == "cpu" and b == "triton")]
    for name in names:
        reasons = {_reason_against(case, name) for case in cases}
        if None not in reasons:
            parser.error(f"--backend {name}: {reasons.pop()}")

    settings = micro.Settings(QUICK if options.quick else FULL, chosen, options.quick)
    description = machine.describe()
    print(f"{description['gpu'] if device == 'cuda' else description['cpu']}, {description['threads']} threads, "
          f"torch {description['torch']}, commit {(description['commit'] or 'unknown')[:9]}"
          f"{' and changes' if description['dirty'] else ''}")  # fmt: skip
    limits = ceilings.measure(device, {case.dtype for case in cases})
    print(f"copy {limits.copy / 1e9:.1f} GB/s; products " + ", ".join(
        f"{dtype} {rate / 1e12:.2f} TFLOP/s" for dtype, rate in limits.matmul.items()))  # fmt: skip

    rows: list[dict[str, Any]] = []
    for case in cases:
        print(case.name, flush=True)
        try:
            new = (
                micro.measure(case, settings, limits) if isinstance(case, Case) else model_suite.measure(case, settings)
            )
        except Disagreement as error:
            print(f"error: {error}\nstopped: results must agree before they are timed", file=sys.stderr)
            return 1
        for row in new:
            print("  " + _line(row), flush=True)
        rows += new

    result = {
        "machine": description,
        "settings": {
            "device": device, "suite": options.suite or "all", "quick": options.quick, "backends": chosen,
            # Only a run of all cases, some kernel among the providers, may stand in the README.
            "complete": not (options.quick or ops or options.dtype) and chosen != ["reference"],
            "budget": settings.budget._asdict(),
            "memory": footprint.GPU_MEMORY if device == "cuda" else footprint.CPU_MEMORY,
            "resident_memory": resident.MEMORY,
        },
        "ceilings": {"copy_bytes_per_second": limits.copy, "matmul_operations_per_second": limits.matmul},
        "rows": rows,
    }  # fmt: skip
    if options.json is not None:
        path = Path(options.json) if options.json else report.default_path(
            description["date"], device, options.suite or "all")  # fmt: skip
        report.write_json(path, result)
        print(f"written: {path}")
    if options.plot:
        report.plot(rows, Path(options.plot))
        print(f"written: {options.plot}")
    if options.markdown:
        print("\n" + report.markdown(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--suite", choices=SUITES, help="default: both")
    parser.add_argument("--op", help=f"one or more of {', '.join(OPS)}, with commas between")
    parser.add_argument("--backend", help=f"one or more of {', '.join(backends.BACKENDS)}; default: all that can")
    parser.add_argument("--dtype", choices=DTYPES, help="all cases in this dtype, without their targets")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's choice")
    parser.add_argument("--quick", action="store_true", help="few cases and rounds, compiling few chains")
    parser.add_argument("--json", nargs="?", const=TO_DEFAULT_PATH, metavar="PATH",
                        help="record the run; without a path in benchmarks/results/")  # fmt: skip
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


def _reason_against(case: Case | ModelCase, backend: str) -> str | None:
    module = providers if isinstance(case, Case) else model_suite
    return module.reason_against(case, backend)


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
