# SPDX-License-Identifier: MIT
"""The CUDA kernels without a GPU: csrc/cuda, compiled by g++ on cuda/emulation, as a module like `_native.cuda`.

Its kernels take CPU tensors. AddressSanitizer checks their accesses, so the process must preload libasan; `environment`
returns the variables for that.
"""

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch

from tokred_kernels import backends
from tokred_kernels.backends import native

ROOT = Path(__file__).resolve().parents[1]
EMULATION = ROOT / "tests/cuda/emulation"
CSRC = ROOT / "csrc"
SOURCES = [
    *sorted(CSRC.glob("cuda/*.cu"), key=lambda path: -path.stat().st_size),
    *CSRC.glob("bindings*.cpp"),
    *EMULATION.glob("*.cpp"),
]
HEADERS = [path for folder in (CSRC, EMULATION) for path in folder.rglob("*.*h")]
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas"),
    *("-DTOKRED_EMULATION", "-DTOKRED_WITH_CUDA", '-DTOKRED_CUDA_ARCHITECTURES="emulated"', f"-I{EMULATION}"),
    # torch brings the headers of pybind11.
    *("-isystem", str(Path(torch.__file__).parent / "include"), "-isystem", sysconfig.get_paths()["include"]),
    # Wrong pointers and indices only: all of "undefined" would double the compile time.
    *("-fsanitize=address,alignment,shift,signed-integer-overflow", "-fno-sanitize-recover=all"),
]
COMPILER = shutil.which("g++")
VARIABLE = "TOKRED_EMULATION"
IN_USE = os.environ.get(VARIABLE) == "1"  # whether this process runs its CUDA tests in the emulator
H100_SHARED = 227 * 1024  # bytes of dynamic shared memory that a block can have
SMALL_SHARED = 99 * 1024  # the same on the supported architecture with the least


def environment():
    """Return the environment of a process whose CUDA tests run in the emulator."""
    preloaded = (
        subprocess.check_output([COMPILER, f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "stdc++")
    )
    return {**os.environ, VARIABLE: "1", "LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}


def build():
    """Return the path of the module, compiled if it is not in the temporary folder for this state of the sources."""
    common = "\0".join([*FLAGS, *(path.read_text() for path in HEADERS)])
    folder = Path(tempfile.gettempdir(), f"tokred-emulation-{os.getuid()}")
    folder.mkdir(exist_ok=True)

    def state_of(*texts):
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]

    def make(target, *arguments):
        if not target.exists():
            part = target.with_name(f"{os.getpid()}-{target.name}")
            subprocess.run([COMPILER, *FLAGS, *arguments, "-o", part], check=True)
            part.rename(target)  # at once, so that another process never reads half of it
        return target

    def compile_one(source):
        name = f"{source.stem}-{state_of(common, source.read_text())}.o"
        return make(folder / name, "-x", "c++", "-c", source)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    return make(folder / f"{state_of(*map(str, objects))}.so", "-shared", *objects)


@functools.cache
def load(name):
    """Return a Python module of the file: `_native`, or `_emulation` with the emulator's own functions."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(build()))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(module)
    return module


def controls():
    """Return the emulator's own functions; see cuda/emulation/module.cpp."""
    return load("_emulation")


def configure(shared_limit, reverse):
    """Set how much shared memory a block can have, and whether blocks and threads run from the last to the first."""
    controls().configure(shared_limit, reverse)


class Kernels:
    """`_native.cuda` for CPU tensors: passes the workspaces that the adaptors allocate for GPU tensors only."""

    def __init__(self):
        self._ops = load("_native").cuda

    def __getattr__(self, name):
        return getattr(self._ops, name)

    def use_large_pages(self, address, size):
        """Do nothing: the emulator's results are small."""

    def bipartite_match(self, problem, *arguments):
        self._with_workspace(self._ops.bipartite_match, self._ops.match_workspace_bytes(problem), problem, *arguments)

    def rank_candidates(self, problem, *arguments):
        size = self._ops.rank_candidates_workspace_bytes(problem)
        self._with_workspace(self._ops.rank_candidates, size, problem, *arguments)

    def count_above_threshold(self, score, images, sources, threshold, divisor, own, _, counts, stream):
        moments = torch.full((images, 2), torch.nan, dtype=torch.float64)
        address = moments.data_ptr() if divisor else 0
        self._ops.count_above_threshold(score, images, sources, threshold, divisor, own, address, counts, stream)

    @staticmethod
    def _with_workspace(op, size, problem, *arguments):
        *outputs, _, stream = arguments
        stale = torch.full((size,), 0xFF, dtype=torch.uint8)
        op(problem, *outputs, stale.data_ptr() if size else 0, stream)


def install(monkeypatch):
    """Let the backend "cuda" run the emulated kernels on CPU tensors."""
    kernels = Kernels()
    can_run = backends.can_run

    def emulated_can_run(op, backend, device, dtype, head_dim=0):
        return can_run(op, backend, "cuda" if backend == "cuda" else device, dtype, head_dim)

    monkeypatch.setattr(native, "MODULE", SimpleNamespace(cpu=kernels))
    monkeypatch.setattr(native, "CUDA", kernels)
    monkeypatch.setattr(backends, "can_run", emulated_can_run)
    monkeypatch.setattr(backends, "_chosen", {})
