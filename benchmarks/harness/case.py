# SPDX-License-Identifier: MIT
"""A benchmark case: one op at one shape, with its inputs, PyTorch baseline, lower bounds and targets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import tokred_kernels as tk
from tokred_kernels.ops.registry import SPECS

# The ops whose kernels each case runs, in the order of the tables.
ORDER = (
    *("bipartite_match", "kth_bipartite_match", "random_bipartite_match", "merge", "merge_wavg", "unmerge"),
    *("bipartite_merge", "window_match", "window_merge", "adaptive_bipartite_match", "grid_bipartite_match"),
    *("importance_match", "keep_topk", "token_attention", "lookup_gather", "lookup_scatter", "then", "to_csr"),
)
COMBINED = {
    "window_merge": (*SPECS["window_match"].parts, "merge"),
    "keep_topk": ("keep_topk", "merge"),
    "lookup_scatter": ("lookup_gather", "lookup_scatter"),
    "then": ("compose",),
}
KERNELS = {op: COMBINED.get(op) or SPECS[op].parts or (op,) for op in ORDER}
# The number of tokens to merge depends on the tokens. It is read back to the host.
ADAPTIVE_OPS = ("window_match", "window_merge", "adaptive_bipartite_match")

# Measure of a row: which side of its bound is right, the text of a bound, and the format of a value.
MEASURES = {
    "speedup": ("least", "{:g}x the PyTorch baseline", "{:.1f}x"),
    "speedup_compiled": ("least", "{:g}x the compiled baseline", "{:.1f}x"),
    "speedup_reference": ("least", "{:g}x the eager reference", "{:.1f}x"),
    "copy_share": ("least", "{:.0%} of the copy bandwidth", "{:.0%}"),
    "matmul_share": ("least", "{:.0%} of a matrix product's rate", "{:.0%}"),
    "flops_efficiency": ("least", "{:g} of the FLOPs ratio", "{:.2f}"),
    "times_clone": ("most", "{:g}x the time of x.clone()", "{:.2f}x"),
    "times_fused": ("most", "{:g}x the time of plain SDPA", "{:.2f}x"),
    "median_us": ("most", "{:g} us", "{:.1f} us"),
    "peak_share": ("most", "{:.0%} of the baseline's peak memory", "{:.0%}"),
    "working_share": ("most", "{:.0%} of the baseline's memory beyond the results", "{:.0%}"),
    "peak_per_token": ("most", "{:g} bytes of memory per token", "{:.0f} B"),
}
INT32 = FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Target:
    """A bound on one measure of a row."""

    measure: str
    bound: float

    def judge(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the target, the row's value and whether it meets the bound; None if the row lacks the measure."""
        value = row.get(self.measure)
        met = None
        if value is not None:
            met = value >= self.bound if MEASURES[self.measure][0] == "least" else value <= self.bound
        return {"measure": self.measure, "bound": self.bound, "value": value, "met": met}

    def __str__(self) -> str:
        side, text, _ = MEASURES[self.measure]
        return f"at {side} {text.format(self.bound)}"


@dataclass(frozen=True)
class Case:
    """One op at one shape. Each family has a subclass.

    Attributes:
        op: the op's name; "then" is TokenMap.then, "to_csr" builds a map's CSR view, "window_merge" is window_match
            followed by merge_wavg, and "keep_topk" includes the fusion of the dropped tokens.
        model: the model that the shape comes from.
        shape: (B, N, C).
        r: number of tokens to merge, of windows, or of dropped tokens; k of kth_bipartite_match; number of LookupViT's
            compressed tokens.
        metric_dim: D of a metric (B, N, D), or the head dimension.
        heads: number of heads, or 0 for a metric (B, N, D).
        variant: reduction of `merge`; some of "size", "policy" and "class", joined by "+", for token_attention.
        window: height and width of a window, or of a cell of grid_bipartite_match.
        training: time forward and backward instead of forward alone.
        host: time the overhead on the host, with tiny tensors.
        quick: part of --quick.
        quick_compile: --quick compiles the baseline too, which takes seconds.
    """

    op: str
    model: str
    shape: tuple[int, int, int]
    r: int
    device: str
    dtype: str = "float32"
    _: KW_ONLY
    metric_dim: int = 64
    heads: int = 0
    variant: str = ""
    window: tuple[int, int] = (2, 2)
    training: bool = False
    host: bool = False
    quick: bool = False
    quick_compile: bool = False
    targets: tuple[Target, ...] = ()

    @property
    def name(self) -> str:
        """The key of this case in the recorded results."""
        kind = "overhead" if self.host else "training" if self.training else ""
        kind = "-".join(filter(None, (self.variant, kind)))
        kind += f"keys{self.heads}" if self.heads and self.op.endswith("_match") else ""
        kind += "{}x{}".format(*self.window) if self.window != (2, 2) else ""
        return "/".join(
            filter(None, (self.op, kind, self.model, f"b{self.shape[0]}", f"r{self.r}", self.dtype, self.device))
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the tokens."""
        return getattr(torch, self.dtype)

    @property
    def item(self) -> int:
        """Bytes of one number of the tokens."""
        return self.torch_dtype.itemsize

    @property
    def prefix(self) -> int:
        """Number of leading tokens that are protected: the class token, which a diffusion model lacks."""
        return int(self.op != "grid_bipartite_match")

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the tokens after the prefix, as square as possible."""
        tokens = self.shape[1] - self.prefix
        height = next(side for side in range(math.isqrt(tokens), 0, -1) if tokens % side == 0)
        return height, tokens // height

    @property
    def label(self) -> str:
        """The shape as the tables print it."""
        raise NotImplementedError

    def draw(self, seed: int) -> SimpleNamespace:
        """Return random inputs. For training, `leaves` names those with a gradient and `grads` are those of outputs."""
        raise NotImplementedError

    def baseline(self) -> tuple[Callable[..., Any], tuple[str, ...]] | None:
        """Return the PyTorch baseline as a function, and the names of the inputs that it takes."""
        raise NotImplementedError

    def yardsticks(self) -> dict[str, Callable[[SimpleNamespace], Any]]:
        """Return computations that are timed for comparison and compute something else: "clone", "fused", "flex"."""
        return {}

    def ours(self, inputs: SimpleNamespace) -> Any:
        """Call this package."""
        raise NotImplementedError

    def values(self, output: Any) -> tuple[Any, ...]:
        """Return the parts of an output that are checked: a token map or a baseline's plan first, then tensors."""
        whole = isinstance(output, Tensor | tk.TokenMap) or hasattr(output, "merge")
        return tuple(sorted((output,) if whole else output, key=lambda part: isinstance(part, Tensor)))

    def slots(self) -> int:
        """Return N', the number of output tokens."""
        return self.shape[1] - min(self.r, (self.shape[1] - 1) // 2)

    def least_bytes(self) -> int:
        """Return the lower bound on memory traffic: each input read once, each output written once."""
        raise NotImplementedError

    def operations(self) -> int:
        """Return the floating-point operations of the matrix products."""
        return 0

    def result_bytes(self) -> int:
        """Return the bytes of the results, which no implementation can save."""
        return 0


def map_bytes(batch: int, tokens: int, slots: int) -> int:
    """Return the bytes of a token map: dest and members for each token, begin and count for each output token."""
    return INT32 * batch * (2 * tokens + 2 * slots)
