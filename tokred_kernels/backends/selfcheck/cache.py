# SPDX-License-Identifier: MIT
"""Keep verdicts between processes: one JSON file for each combination of device, versions and kernel sources."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tokred_kernels.backends import native
from tokred_kernels.backends.selfcheck.verdict import HUNG, UNKNOWN, Verdict, Verdicts
from tokred_kernels.backends.triton.availability import triton_interprets
from tokred_kernels.files import replace_text
from tokred_kernels.version import __version__

SCHEMA = 1
LONGEST_WAIT = 1800.0  # seconds for another process to finish its check
BACKENDS_FOLDER = Path(__file__).resolve().parents[1]
DRIVER_FILES = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


class Unusable(Exception):
    """The cache folder cannot be used; the message says which and why."""


def folder() -> Path:
    """Return the cache folder, whether or not it exists.

    Raises:
        Unusable: the home folder is unknown, and TOKRED_CACHE_DIR is not set.
    """
    named = os.environ.get("TOKRED_CACHE_DIR")
    try:
        return Path(named) if named else Path.home() / ".cache" / "tokred_kernels"
    except RuntimeError as error:
        raise Unusable(f"the cache needs a home folder ({error}); set TOKRED_CACHE_DIR") from error


def made_folder() -> Path:
    """Return the cache folder, created if it is missing.

    Raises:
        Unusable: it cannot be created, or is not a folder.
    """
    path = folder()
    try:
        if path.exists() and not path.is_dir():
            raise Unusable(f"the cache folder {path} is a file; set TOKRED_CACHE_DIR to a folder")
        path.mkdir(parents=True, exist_ok=True)
        return path
    except OSError as error:
        raise Unusable(f"the cache folder {path} cannot be written ({error.strerror}); set TOKRED_CACHE_DIR") from error


def facts(device: torch.device) -> dict[str, Any]:
    """Return everything that a verdict depends on; the cache's key is a hash of it."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": triton_version(),
        "package": __version__,
        "interpreter": triton_interprets(),
        "sources": sources(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "architecture": architecture(device), "driver": driver()}
    else:
        isa = "" if native.MODULE is None else native.MODULE.cpu.instruction_set()
        found |= {"device": platform.processor() or platform.machine(), "architecture": isa, "driver": ""}
    return found


def architecture(device: torch.device) -> str:
    """Return the GPU's architecture, such as "sm_90" or "gfx942"."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def triton_version() -> str:
    """Return Triton's version, "" if it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def driver() -> str:
    """Return what identifies the GPU's driver: its release, or the CUDA version that it supports."""
    for name in DRIVER_FILES:
        with contextlib.suppress(OSError):
            return Path(name).read_text().partition("\n")[0]
    version = ctypes.c_int()
    for library in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version))
    return str(version.value)


@functools.cache
def sources() -> str:
    """Return a hash of the kernels: the Python files of all backends, their settings, and the native module."""
    files = [path for path in BACKENDS_FOLDER.rglob("*") if path.suffix in (".py", ".json")]
    if native.MODULE is not None and native.MODULE.__file__:
        files.append(Path(native.MODULE.__file__))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def key(of: dict[str, Any]) -> str:
    """Return the name of the cache file for these facts."""
    device = re.sub(r"[^a-z0-9]+", "-", str(of["device"]).lower()).strip("-")
    return f"{device or 'device'}-{hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]}"


def read(of: dict[str, Any]) -> Verdicts:
    """Return the cached verdicts; none if the file is missing or corrupt, or was written for other facts."""
    try:
        content = json.loads((folder() / f"{key(of)}.json").read_text())
        if content["schema"] != SCHEMA or content["facts"] != json.loads(json.dumps(of)):
            return {}
        return {
            backend: {op: Verdict.from_json(verdict) for op, verdict in ops.items()}
            for backend, ops in content["verdicts"].items()
        }
    except (Unusable, OSError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        # Ignore a file that is corrupt, or that another program wrote.
        return {}


def write(of: dict[str, Any], verdicts: Verdicts) -> None:
    """Add `verdicts` to the file for these facts, in one step, so that no reader sees half of it.

    "unknown" says nothing about a kernel and is left out, as is "hung" if the user has set the time limit.

    Raises:
        Unusable: the folder cannot be written.
    """
    path = made_folder() / f"{key(of)}.json"
    merged = read(of)
    for backend, ops in verdicts.items():
        unclear = (UNKNOWN, HUNG) if os.environ.get("TOKRED_SELFCHECK_TIMEOUT") else (UNKNOWN,)
        known = {op: verdict for op, verdict in ops.items() if verdict.verdict not in unclear}
        merged[backend] = merged.get(backend, {}) | known
    content = {"schema": SCHEMA, "facts": of, "verdicts": merged}
    try:
        replace_text(path, json.dumps(content, default=vars, indent=1))
    except OSError as error:
        raise Unusable(f"{path} cannot be written ({error.strerror}); set TOKRED_CACHE_DIR") from error


@contextlib.contextmanager
def lock(of: dict[str, Any], on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock on the file for these facts: one process of a machine checks at a time.

    If another process holds it, call `on_wait` once and wait. The operating system releases the lock of a process
    that ends.

    Raises:
        Unusable: the folder cannot be written.
    """
    import filelock  # noqa: PLC0415  (one of torch's requirements; 30 ms to import, which only a check needs)

    path = made_folder() / f"{key(of)}.lock"
    try:
        held = filelock.FileLock(path)
        try:
            held.acquire(timeout=0)
        except filelock.Timeout:
            on_wait()
            held.acquire(timeout=LONGEST_WAIT)
    except (OSError, NotImplementedError) as error:  # Timeout, or a network file system without locks
        raise Unusable(f"{path} cannot be written or locked ({error}); set TOKRED_CACHE_DIR") from error
    try:
        yield
    finally:
        held.release()
