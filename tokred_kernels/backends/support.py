# SPDX-License-Identifier: MIT
"""The kernels that exist, the devices that can run them, and the function that runs one."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from tokred_kernels.backends import native

BACKENDS = ("reference", "cpu", "cuda", "triton")
OPS = (
    "bipartite_match",
    "rank_candidates",
    "build_match_map",
    "window_similarity",
    "window_map",
    "count_above_threshold",
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
    "to_csr",
    "compose",
)
# Ops on scores and integers: the dtype of the tokens does not matter.
MAP_OPS = frozenset(("build_match_map", "window_map", "count_above_threshold", "keep_topk", "to_csr", "compose"))
# Registered ops that run the kernels of other ops, and need all of them.
COMPOUNDS = {"bipartite_merge": ("bipartite_match", "merge")}
# The op whose kernel computes the gradient.
BACKWARD = {
    "merge": "merge_backward",
    "unmerge": "merge",
    "token_attention": "token_attention_backward",
    "lookup_gather": "lookup_gather_backward",
    "lookup_scatter": "lookup_scatter_backward",
}
# Ops without a CUDA kernel: they are tiles of matrix products, which Triton does well.
NO_CUDA_OPS = ("token_attention", "token_attention_backward")

OLDEST_TRITON = (3, 3)
# Triton's own minimum for the matrix units and asynchronous copies that the kernels use.
OLDEST_CAPABILITY_OF_TRITON = (8, 0)
_FAMILY = {"reference": "reference", "cpu": "native", "cuda": "native", "triton": "triton"}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {"cpu": (*_FLOATS, torch.float64), "cuda": _FLOATS, "triton": _FLOATS}


def triton_interprets() -> bool:
    """Return whether Triton's interpreter is on, so that its kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _reason_against_triton() -> str | None:
    """Return why no Triton kernel can run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed (pip install "tokred_kernels[triton]")'
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build with another name, such as that of torch's nightlies
        return None
    if tuple(map(int, version.split(".")[:2])) >= OLDEST_TRITON:
        return None
    oldest = ".".join(map(str, OLDEST_TRITON))
    return f"triton {version} is too old: its kernels need {oldest}, which comes with torch 2.7"


_AGAINST_TRITON = _reason_against_triton()


@functools.cache
def _reason_against_device(backend: str, index: int) -> str | None:
    """Return why `backend` cannot run on this GPU at all, or None."""
    if backend == "cuda":
        return native.cuda_failure(index)
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST_CAPABILITY_OF_TRITON:
            oldest = "{}.{}".format(*OLDEST_CAPABILITY_OF_TRITON)
            return "triton kernels need compute capability {}, this GPU has {}.{}".format(oldest, *capability)
    return None


def reason_against(op: str, backend: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Return why `backend` cannot run `op` on tensors with this device and dtype, or None if it can.

    On a machine without a GPU, the facts about the GPU itself are left out.
    """
    if backend == "reference":
        return None
    if op in COMPOUNDS:
        reasons = (reason_against(part, backend, device, dtype) for part in COMPOUNDS[op])
        return next((reason for reason in reasons if reason is not None), None)
    kind, _, number = str(device).partition(":")
    if backend == "triton":
        if _AGAINST_TRITON is not None:
            return _AGAINST_TRITON
        if kind != "cuda" and not (kind == "cpu" and triton_interprets()):
            return f"triton kernels need a GPU tensor, got one on {kind} (or set TRITON_INTERPRET=1 before importing)"
    else:
        if native.MODULE is None:
            return f"the native module is missing ({native.FAILURE}); reinstall the package"
        if backend == "cuda" and op in NO_CUDA_OPS:
            return f"{op} has no cuda kernel"
        if backend == "cuda" and native.CUDA is None:
            return "this build has no CUDA kernels; reinstall with nvcc on the path and TOKRED_CUDA=1"
        if kind != backend:
            return f"{backend} kernels need a {backend} tensor, got one on {kind}"
    if dtype not in _DTYPES[backend] and op not in MAP_OPS:
        return f"{backend} kernels take {', '.join(str(d)[6:] for d in _DTYPES[backend])}, got {str(dtype)[6:]}"
    if kind == "cuda" and torch.cuda.is_available():
        return _reason_against_device(backend, int(number) if number else torch.cuda.current_device())
    return None


@functools.cache
def implementation(backend: str, op: str) -> Callable[..., Any]:
    """Return the function of `backend` that computes `op`, imported at first use."""
    return getattr(importlib.import_module(f"tokred_kernels.backends.{_FAMILY[backend]}.{op}"), op)
