# SPDX-License-Identifier: MIT
"""Records which GPU kernels a run on a GPU has shown right: `auto` takes no others.

python -m pytest -m gpu --junit-xml=gpu-tests.xml
python benchmarks/run.py --device cuda --json
python benchmarks/verify.py gpu-tests.xml

An op counts on a backend when some GPU test ran it there and none of it failed, and the benchmark of the same commit,
which has no row of what disagrees, has a row of it and no failure. The reports may be several, of parts of the tests.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

if not __package__:  # run as a file: the folder above holds this package, and comes after what is installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, report
from benchmarks.cases import CASES
from benchmarks.providers import BACKWARD_OPS, KERNEL_OPS
from benchmarks.table import newest
from tokred_kernels import backends
from tokred_kernels.files import replace_text

VERIFIED = Path(__file__).resolve().parents[1] / "tokred_kernels" / "backends" / "verified.json"
OPS = {
    "cuda": tuple(op for op in backends.OPS if op not in backends.NO_CUDA_OPS),
    "triton": backends.TRITON_OPS,
}
# Where an op's tests are, other than in tests/ops/test_<op>.py: the file, and a word of the test's name.
TESTED_IN = {
    "merge_backward": ("test_merge", "gradient"),
    "token_attention_backward": ("test_token_attention", "gradient"),
    "lookup_gather_backward": ("test_lookup_gather", "gradient"),
    "lookup_scatter_backward": ("test_lookup_scatter", "gradient"),
    "invert": ("test_token_map", "maps"),
    "compose": ("test_token_map", "maps"),
}
# Tests of the tools, which say nothing of a kernel: what is timed is checked again in the run.
OF_TOOLS = ("test_benchmarks",)


class Test(NamedTuple):
    """One test that ran."""

    file: str
    name: str
    parameters: tuple[str, ...]


def read_tests(junit: Path) -> tuple[list[Test], list[Test]]:
    """Those of a pytest report that passed, and those that failed; files that could not be read are among these."""
    passed, failed = [], []
    for case in ElementTree.parse(junit).iter("testcase"):
        outcomes = {child.tag for child in case}
        name, place = case.get("name", ""), case.get("classname", "")
        function, _, inside = name.partition("[")
        file = (place or function).rpartition(".")[2]  # a file that pytest could not import has its name as the test's
        test = Test(file, function, tuple(re.split(r"[^A-Za-z0-9_]+", inside.rstrip("]"))))
        if outcomes & {"failure", "error"}:
            failed.append(test)
        elif "skipped" not in outcomes:
            passed.append(test)
    return passed, failed


def denied(failed: list[Test]) -> set[tuple[str, str]]:
    """(backend, op) that failed tests speak against: of whatever their files are about, on whatever they ran on.

    A file whose name tells no op speaks against all.
    """
    found = set()
    for test in failed:
        if test.file in OF_TOOLS:
            continue
        # A file's name comes first: in those of Triton's kernels a parameter "cuda" is the tensors' device.
        named = [b for b in OPS if f"test_{b}" in test.file] or [b for b in OPS if b in test.parameters] or list(OPS)
        subject = re.sub("^test_(triton_?)?", "", test.file)
        whole = {*KERNEL_OPS.get(subject, ()), *(BACKWARD_OPS.get(subject, ()) if "gradient" in test.name else ())}
        about = {
            op for op in backends.OPS
            if op in whole or TESTED_IN.get(op, ("",))[0] == test.file
            or (subject and (op.startswith(subject) or subject.startswith(op)))
        }  # fmt: skip
        found |= {(backend, op) for backend in named for op in about or backends.OPS}
    return found


def timed_ops(result: dict) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """(backend, op) of the kernels that rows of a GPU run ran, and of those that failed in it.

    What ran out of memory was not wrong; it lacks a row. A case that failed as a whole speaks against every backend.

    Raises:
        ValueError: the run was not on a GPU, or of another commit than this tree's.
    """
    if result["settings"]["device"] != "cuda" or not result["machine"]["gpu"]:
        raise ValueError("the results are not of a run on a GPU; nothing is recorded")
    commit, here = result["machine"]["commit"], machine.describe()["commit"]
    if commit != here:
        raise ValueError(f"the results are of commit {commit}, this tree is {here}; nothing is recorded")
    if commit is None:
        raise ValueError("the commit is not known (TOKRED_COMMIT names it); nothing is recorded")
    training = {case.name for case in CASES if case.training}
    cases = {case.name: case for case in CASES}
    found, failed = set(), set()
    for row in result["rows"]:
        if row["suite"] == "micro":
            ops = KERNEL_OPS[row["op"]] + (BACKWARD_OPS[row["op"]] if row["case"] in training else ())
            found |= {(row["provider"], op) for op in ops}
    for failure in result.get("failures", []):
        case = cases.get(failure["case"])
        if case is not None and failure["error"] != "OutOfMemoryError":
            ops = KERNEL_OPS[case.op] + (BACKWARD_OPS[case.op] if case.training else ())
            failed |= {(backend, op) for backend in OPS if failure["provider"] in (backend, None) for op in ops}
    return found, failed


def shown_right(
    tests: list[Test], timed: set[tuple[str, str]], untested: set[tuple[str, str]], untimed: set[tuple[str, str]]
) -> dict[str, list[str]]:
    """The ops of each GPU backend that both kinds of evidence name, and neither speaks against."""
    found: dict[str, list[str]] = {}
    for backend, ops in OPS.items():
        found[backend] = []
        for op in ops:
            file, word = TESTED_IN.get(op, (f"test_{op}", ""))
            tested = any(t.file == file and word in t.name and backend in t.parameters for t in tests)
            reasons = {
                f"no passed test in {file}.py": not tested,
                "a test failed": (backend, op) in untested,
                "no row in the results": (backend, op) not in timed,
                "it failed in the benchmark": (backend, op) in untimed,
            }
            against = next((reason for reason, true in reasons.items() if true), None)
            if against is None:
                found[backend].append(op)
            else:
                print(f"{backend} {op}: not shown right: {against}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("junit", type=Path, nargs="+", help="what pytest --junit-xml wrote")
    parser.add_argument("--results", type=Path, help="what run.py --json wrote; default: the newest run on a GPU")
    parser.add_argument("--output", type=Path, default=VERIFIED)
    options = parser.parse_args(arguments)
    for path in (*options.junit, *filter(None, [options.results])):
        if not path.is_file():
            parser.error(f"there is no {path}: the tests and the micro suite on a GPU write what this reads")
    run = None if options.results else newest(report.RESULTS, "cuda", "micro", complete=False)
    if run is None and options.results is None:
        parser.error(f"{report.RESULTS} has no run of the micro suite on a GPU")
    path = options.results or run.path
    try:
        reports = [read_tests(junit) for junit in options.junit]
        failed = [test for _, others in reports for test in others]
        for test in failed:
            print(f"failed: {test.file}::{test.name} {'-'.join(test.parameters)}")
        passed = [test for tests, _ in reports for test in tests]
        timed, untimed = timed_ops(report.read_json(path))
        found = shown_right(passed, timed, denied(failed), untimed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    replace_text(options.output, json.dumps(found) + "\n")
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
