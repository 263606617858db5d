# SPDX-License-Identifier: MIT
"""The machine that the numbers come from, and the verdicts of the self-check on its GPU."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import tokred_kernels as tk
from tokred_kernels.backends import native, selfcheck

ROOT = Path(__file__).resolve().parents[2]


def describe() -> dict[str, Any]:
    """Return CPU, threads, GPU, driver, versions, commit, whether the tree has changes, and the date.

    TOKRED_COMMIT names the commit of a tree without a git repository.
    """
    changes = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "tokred_kernels": tk.__version__,
        "native": native.MODULE.cpu.instruction_set() if native.MODULE is not None else None,
        "commit": os.environ.get("TOKRED_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def verdicts(device: str) -> dict[str, dict[str, selfcheck.Verdict]]:
    """Return the self-check's verdicts on this GPU, after running it if it is due; none for a CPU."""
    return selfcheck.verdicts(torch.device("cuda", torch.cuda.current_device())) if device == "cuda" else {}


def failures(verdicts: dict[str, dict[str, selfcheck.Verdict]]) -> dict[tuple[str, str], str]:
    """Return why a kernel did not pass the self-check, by backend and op."""
    return {
        (backend, op): f"{op} did not pass the self-check: {found.verdict}, {found.reason}"
        for backend, by_op in verdicts.items()
        for op, found in by_op.items()
        if found.verdict not in ("passed", "unsupported")
    }


def tuned_digest() -> str | None:
    """Return a hash of tuned.json, which a GPU run can write without a commit; None if the file does not exist."""
    path = ROOT / "tokred_kernels" / "backends" / "triton" / "tuned.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton  # noqa: PLC0415  (optional)

    return triton.__version__


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
