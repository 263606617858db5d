# SPDX-License-Identifier: MIT
"""Choosing a backend: one predicate that says why one cannot serve a call, read by everything that asks."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokred_kernels.backends import native

BACKENDS = ("reference", "cpu", "cuda", "triton")
AUTO = "auto"
OPS = (
    "bipartite_match",
    "best_match",
    "match_map",
    "window_similarity",
    "window_map",
    "similar_count",
    "merge",
    "merge_backward",
    "unmerge",
    "keep_topk",
    "token_attention",
    "token_attention_backward",
    "lookup_gather",
    "lookup_gather_backward",
    "lookup_scatter",
    "lookup_scatter_backward",
    "invert",
    "compose",
)
# Of scores and whole numbers, not of tokens: what dtype these have does not matter.
MAP_OPS = frozenset(("match_map", "window_map", "similar_count", "keep_topk", "invert", "compose"))
# Registered ops that run the kernels of others, and can be where all of those can.
COMPOUNDS = {"bipartite_merge": ("bipartite_match", "merge")}
TRITON_OPS = (
    "bipartite_match",
    "best_match",
    "match_map",
    "window_similarity",
    "window_map",
    "similar_count",
    "merge",
    "merge_backward",
    "unmerge",
    "keep_topk",
    "token_attention",
    "token_attention_backward",
    "lookup_gather",
    "lookup_gather_backward",
    "lookup_scatter",
    "lookup_scatter_backward",
    "invert",
    "compose",
)

# Native on the CPU alone: on a GPU they are tiles of matrix products, which are Triton's.
NO_CUDA_OPS = ("token_attention", "token_attention_backward")

# What `auto` tries, in order, by device; the first that can serve the call, and has been shown right there, does.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
# Tiles of matrix products: in CUDA there are simple versions, without tensor cores.
TRITON_FIRST = ("lookup_gather", "lookup_gather_backward", "lookup_scatter", "lookup_scatter_backward")
# GPU ops that a recorded run on a GPU has shown right; `benchmarks/verify.py` writes this after such a run.
VERIFIED: dict[str, list[str]] = json.loads((Path(__file__).parent / "verified.json").read_text())

# From how many tokens on the CPU's attention serves sizes in float32, with vectors of 64 bytes, and not torch's with a
# bias. Torch's is at its best where TORCHS_BLOCK divides them, which is seldom what merging leaves; of other numbers,
# ragged ones, fewer are enough, fewest in heads of WIDE_HEADS channels or more. The CPU's benchmarks time the shortest.
LONG, RAGGED, RAGGED_IF_NARROW = 160, 97, 129
WIDE_HEADS, TORCHS_BLOCK = 64, 16

OLDEST_TRITON = (3, 3)
_FAMILY = {"reference": "reference", "cpu": "native", "cuda": "native", "triton": "triton"}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {"cpu": (*_FLOATS, torch.float64), "cuda": _FLOATS, "triton": _FLOATS}


def _against_triton() -> str | None:
    """Why no kernel of Triton can run at all; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed (pip install "tokred_kernels[triton]")'
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build of another name, such as those of torch's nightlies
        return None
    if tuple(map(int, version.split(".")[:2])) >= OLDEST_TRITON:
        return None
    oldest = ".".join(map(str, OLDEST_TRITON))
    return f"triton {version} is too old: its kernels need {oldest}, which comes with torch 2.7"


_AGAINST_TRITON = _against_triton()


def _valid(name: str) -> str:
    if name not in (AUTO, *BACKENDS):
        raise ValueError(f"tokred_kernels: backend must be one of {', '.join((AUTO, *BACKENDS))}, got {name!r}")
    return name


_wanted = _valid(os.environ.get("TOKRED_BACKEND", AUTO))
_chosen: dict[tuple[str, str, torch.device, torch.dtype, tuple[str, ...]], str] = {}


class use_backend:
    """Choose the backend for every op: at once and for good, or for a `with` block.

    Args:
        name: "reference", "cpu", "cuda", "triton", or "auto" (the best that is present for the tensors' device, and the
            default; the environment variable TOKRED_BACKEND sets another default).

    A backend that is named and cannot serve a call makes that call raise RuntimeError, saying why and what would work;
    only "auto" looks further. The choice is the process's, not the thread's.
    """

    def __init__(self, name: str) -> None:
        global _wanted  # noqa: PLW0603
        self._before = _wanted
        _wanted = _valid(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *_: object) -> None:
        global _wanted  # noqa: PLW0603
        _wanted = self._before


def triton_interprets() -> bool:
    """Whether Triton's interpreter is on, so that its kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def reason_against(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run `op` on tensors of this device and dtype; None where it can."""
    if backend == "reference":
        return None
    if op in COMPOUNDS:
        for part in COMPOUNDS[op]:
            reason = reason_against(part, backend, device, dtype)
            if reason is not None:
                return reason
        return None
    if backend == "triton":
        if _AGAINST_TRITON is not None:
            return _AGAINST_TRITON
        if device != "cuda" and not (device == "cpu" and triton_interprets()):
            return f"triton kernels need a GPU tensor, got one on {device} (or set TRITON_INTERPRET=1 before importing)"
        if op not in TRITON_OPS:
            return f"{op} has no triton kernel"
    else:
        if native.MODULE is None:
            return f"the native module is not there ({native.FAILURE}); reinstall the package"
        if backend == "cuda" and op in NO_CUDA_OPS:
            return f"{op} has no cuda kernel"
        if backend == "cuda" and native.CUDA is None:
            return "this build has no CUDA kernels; reinstall with nvcc on the path and TOKRED_CUDA=1"
        if device != backend:
            return f"{backend} kernels need a {backend} tensor, got one on {device}"
    if dtype not in _DTYPES[backend] and op not in MAP_OPS:
        return f"{backend} kernels take {', '.join(str(d)[6:] for d in _DTYPES[backend])}, got {str(dtype)[6:]}"
    return None


def best(op: str, tensor: Tensor) -> str:
    """The backend that `auto` takes."""
    if tensor.is_cpu and op in MAP_OPS and native.MODULE is not None:
        return "cpu"  # what `_choose` says too; but between two layers of a model its way there shows
    return _choose(op, AUTO, tensor)


def beside(op: str, backend: str, tensor: Tensor) -> str:
    """What serves `op`, of whole numbers, after `backend` has found the scores: itself, or the best where it cannot."""
    able = reason_against(op, backend, tensor.device.type, tensor.dtype) is None
    return backend if able else best(op, tensor)


def choose(op: str, tensor: Tensor, *, unfit: tuple[str, ...] = ()) -> str:
    """The backend that serves `op` on this tensor: the one asked for, or the best.

    `unfit` are those whose kernels do not take this shape: the best is another then, and by name one tells so itself.

    Raises:
        RuntimeError: the one asked for cannot, with the reason and those that can.
    """
    return _choose(op, _wanted, tensor, unfit)


def torch_attends(op: str, tensor: Tensor, *, plain: bool, eager: bool = True, unfit: tuple[str, ...] = ()) -> bool:
    """Whether torch's own fused attention serves the call: `plain`, or with a bias on keys.

    It is as good as attention without a bias can be. With one, so it is on the CPU, and it beats weights that are all
    stored where nothing else can be chosen. But on the CPU the kernel here is faster of bfloat16 in AMX tiles, most of
    all at the odd lengths that merging leaves, and of float32 with a bias, in wide vectors from some length on: there
    it serves what is `eager` alone, for in a graph the length would become a guard.
    """
    if tensor.device.type == "cpu" and (
        (native.AMX and tensor.dtype == torch.bfloat16)
        or (eager and not plain and native.WIDE_VECTORS and tensor.dtype == torch.float32 and _is_long(tensor))
    ):
        return _wanted == "cuda"
    if _wanted == AUTO:
        return plain or choose(op, tensor, unfit=unfit) in ("cpu", "reference")
    return _wanted in ("cpu", "cuda")


def _is_long(q: Tensor) -> bool:
    """Whether the CPU's kernel is preferred to torch's in float32 with a bias, q being (B, H, N, d)."""
    tokens, channels = q.shape[-2:]
    ragged = RAGGED if channels >= WIDE_HEADS else RAGGED_IF_NARROW
    return tokens >= LONG or (tokens >= ragged and tokens % TORCHS_BLOCK != 0)


def _choose(op: str, wanted: str, tensor: Tensor, unfit: tuple[str, ...] = ()) -> str:
    if torch.compiler.is_compiling():  # the cache would become a guard of the graph, and its growth a recompilation
        return _decide(op, wanted, tensor.device.type, tensor.dtype, unfit)
    key = (op, wanted, tensor.device, tensor.dtype, unfit)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = _decide(op, wanted, tensor.device.type, tensor.dtype, unfit)
    return chosen


def _decide(op: str, wanted: str, device: str, dtype: torch.dtype, unfit: tuple[str, ...] = ()) -> str:
    if wanted == AUTO:
        order = PREFERENCE.get(device, ("reference",))
        if op in TRITON_FIRST and "triton" in order:
            order = ("triton", *(name for name in order if name != "triton"))
        for backend in order:
            if backend in unfit:
                continue
            parts = COMPOUNDS.get(op, (op,))
            shown_right = all(part in VERIFIED.get(backend, []) for part in parts)
            if (shown_right or device == "cpu" or backend == "reference") and reason_against(
                op, backend, device, dtype
            ) is None:
                return backend
    reason = reason_against(op, wanted, device, dtype)
    if reason is not None:
        able = [name for name in BACKENDS if reason_against(op, name, device, dtype) is None]
        raise RuntimeError(
            f'tokred_kernels.{op}: backend "{wanted}" was asked for and cannot serve this call: {reason}. '
            f"What can: {', '.join(able)}"
        )
    return wanted


@functools.cache
def implementation(backend: str, op: str) -> Callable[..., Any]:
    """The function of `backend` that computes `op`; imported at first use."""
    return getattr(importlib.import_module(f"tokred_kernels.backends.{_FAMILY[backend]}.{op}"), op)


def show_config() -> str:
    """Print (and return) what was built, for which architectures, and what each op would use."""
    lines = [f"tokred_kernels with torch {torch.__version__}; backend: {_wanted}"]
    if native.MODULE is None:
        lines.append(f"native module: missing ({native.FAILURE})")
    else:
        lines.append(f"cpu kernels: {native.MODULE.cpu.instruction_set()}, {torch.get_num_threads()} threads")
        architectures = native.MODULE.cuda_architectures
        lines.append(f"cuda kernels: {architectures or 'not built'}")
    lines.append(f"gpu: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    width = max(map(len, OPS))
    for device in ("cpu", "cuda"):
        for op in OPS:
            against = {b: reason_against(op, b, device, torch.float32) for b in BACKENDS if b != "reference"}
            chosen = _decide(op, AUTO, device, torch.float32)
            why = "; ".join(f"not {b}: {r}" for b, r in against.items() if r and b == device)
            lines.append(f"  {device:4}  {op:{width}}  auto -> {chosen}{'  (' + why + ')' if why else ''}")
    text = "\n".join(lines)
    print(text)
    return text
