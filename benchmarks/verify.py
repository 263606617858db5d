# SPDX-License-Identifier: MIT
"""Records which GPU kernels a run on a GPU has shown right: `auto` takes no others.

python -m pytest -m gpu --junit-xml=gpu-tests.xml
python benchmarks/run.py --device cuda --json
python benchmarks/verify.py gpu-tests.xml

An op counts on a backend when the GPU tests all passed, some of them ran it there, and the benchmark of the same
commit, which stops where results disagree, has a row of it.
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


class Test(NamedTuple):
    """One test that ran and passed."""

    file: str
    name: str
    parameters: tuple[str, ...]


def passed_tests(junit: Path) -> list[Test]:
    """Those of a pytest report that ran and passed.

    Raises:
        ValueError: a test failed.
    """
    passed = []
    for case in ElementTree.parse(junit).iter("testcase"):
        outcomes = {child.tag for child in case}
        name, file = case.get("name", ""), case.get("classname", "").rpartition(".")[2]
        if outcomes & {"failure", "error"}:
            raise ValueError(f"{junit}: {file}::{name} failed; nothing is recorded")
        if "skipped" not in outcomes:
            function, _, inside = name.partition("[")
            passed.append(Test(file, function, tuple(re.split(r"[^A-Za-z0-9_]+", inside.rstrip("]")))))
    return passed


def timed_ops(result: dict) -> set[tuple[str, str]]:
    """(backend, op) of the kernels that rows of a GPU run ran.

    Raises:
        ValueError: the run was not on a GPU, or of another commit than this tree's.
    """
    if result["settings"]["device"] != "cuda" or not result["machine"]["gpu"]:
        raise ValueError("the results are not of a run on a GPU; nothing is recorded")
    commit, here = result["machine"]["commit"], machine.describe()["commit"]
    if commit != here:
        raise ValueError(f"the results are of commit {commit}, this tree is {here}; nothing is recorded")
    training = {case.name for case in CASES if case.training}
    found = set()
    for row in result["rows"]:
        if row["suite"] == "micro":
            ops = KERNEL_OPS[row["op"]] + (BACKWARD_OPS[row["op"]] if row["case"] in training else ())
            found |= {(row["provider"], op) for op in ops}
    return found


def shown_right(tests: list[Test], timed: set[tuple[str, str]]) -> dict[str, list[str]]:
    """The ops of each GPU backend that both kinds of evidence name."""
    found: dict[str, list[str]] = {}
    for backend, ops in OPS.items():
        found[backend] = []
        for op in ops:
            file, word = TESTED_IN.get(op, (f"test_{op}", ""))
            tested = any(t.file == file and word in t.name and backend in t.parameters for t in tests)
            if tested and (backend, op) in timed:
                found[backend].append(op)
            else:
                lacking = "no row in the results" if tested else f"no passed test in {file}.py"
                print(f"{backend} {op}: not shown right: {lacking}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("junit", type=Path, help="what pytest --junit-xml wrote")
    parser.add_argument("--results", type=Path, help="what run.py --json wrote; default: the newest complete GPU run")
    parser.add_argument("--output", type=Path, default=VERIFIED)
    options = parser.parse_args(arguments)
    run = None if options.results else newest(report.RESULTS, "cuda", "micro")
    if run is None and options.results is None:
        parser.error(f"{report.RESULTS} has no complete run of the micro suite on a GPU")
    path = options.results or run.path
    try:
        found = shown_right(passed_tests(options.junit), timed_ops(report.read_json(path)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.output.write_text(json.dumps(found) + "\n")
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
