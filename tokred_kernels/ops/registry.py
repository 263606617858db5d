# SPDX-License-Identifier: MIT
"""The table of ops: each fact about an op is stated here once.

Dispatch, the self-check, FLOP counts, `info`, tests and benchmarks read this table. The module imports nothing of the
package, and importing `tokred_kernels.ops` imports no op, so that the layers below the ops can read the table too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

KERNEL_BACKENDS = ("cpu", "cuda", "triton")


@dataclass(frozen=True)
class OpSpec:
    """The facts about one op.

    Attributes:
        name: the function's name in `ops`, in each backend, and in torch.ops.tokred.
        family: what the op works on; names its module in the self-check's cases, and its benchmarks.
        backends: the backends that have a kernel; the reference has every op.
        backward: the op whose kernel computes the gradient; "" if the op has no gradient.
        is_integer: True for ops on scores and indices, where the dtype of the tokens does not matter.
        parts: the ops whose kernels it runs, if it has no kernel.
        is_registered: whether torch.ops.tokred has the op. The others are functions that call registered ops.
        max_head_dim: the largest head dimension that a backend's kernel takes, by backend; no entry for no limit.
        flops: the floating-point operations of a call with the registered op's arguments; None for ops without matrix
            products.
    """

    name: str
    family: str
    backends: tuple[str, ...] = KERNEL_BACKENDS
    backward: str = ""
    is_integer: bool = False
    parts: tuple[str, ...] = ()
    is_registered: bool = True
    max_head_dim: Mapping[str, int] = field(default_factory=dict)
    flops: Callable[..., int] | None = None

    @property
    def is_matrix_product(self) -> bool:
        """True if the kernels are tiles of matrix products for the matrix units, which take long to compile."""
        return self.family in ("attention", "lookup")


def _match_flops(metric: Any, sources: Any, destinations: Any, first: int, stride: int, *others: Any) -> int:
    num_src, num_dst = others[:2]
    return 2 * metric.shape[0] * num_src * num_dst * metric.shape[-1]


def _rank_flops(metric: Any, sources: Any, destinations: Any, *others: Any) -> int:
    *numbers, cu_seqlens, _ = others
    if cu_seqlens is None:
        return _match_flops(metric, sources, destinations, *numbers)
    lengths = cu_seqlens.diff().tolist()  # each image is split into even and odd tokens
    return sum(2 * (tokens - tokens // 2) * (tokens // 2) * metric.shape[-1] for tokens in lengths)


def _attention_flops(q: Any, k: Any, v: Any, bias: Any, policy: Any, starts: Any, *_: Any) -> int:
    if starts is None:
        return 4 * q.shape[:3].numel() * q.shape[2] * q.shape[3]
    pairs = int(starts.diff().long().square().sum())
    return 4 * pairs * q.shape[1] * q.shape[2]


def _attention_backward_flops(grad_out: Any, grad_importance: Any, *inputs: Any) -> int:
    return _attention_flops(*inputs) * 5 // 2  # five matrix products; the forward has two


def _lookup_flops(q: Any, k: Any, *_: Any) -> int:
    return 4 * q.shape[:3].numel() * k.shape[2] * q.shape[3]


def _gather_backward_flops(grad_out: Any, grad_lse: Any, *inputs: Any) -> int:
    return _lookup_flops(*inputs) * 5 // 2


def _scatter_backward_flops(grad_out: Any, *inputs: Any) -> int:
    return _lookup_flops(*inputs) * 5 // 2


_ATTENTION_BACKENDS = ("cpu", "triton")  # CUDA has no kernel: Triton's reaches the matrix units with less code
_ATTENTION_HEADS = {"triton": 128}
_LOOKUP_HEADS = {"triton": 128, "cuda": 256}

SPECS = {
    spec.name: spec
    for spec in (
        OpSpec("bipartite_match", "match", flops=_match_flops),
        OpSpec("rank_candidates", "match", flops=_rank_flops),
        OpSpec("build_match_map", "maps", is_integer=True),
        OpSpec("window_similarity", "windows"),
        OpSpec("window_map", "windows", is_integer=True),
        OpSpec("count_above_threshold", "maps", is_integer=True),
        OpSpec("merge", "merge", backward="merge_backward"),
        OpSpec("merge_backward", "merge"),
        OpSpec("unmerge", "merge", backward="merge"),
        OpSpec("keep_topk", "maps", is_integer=True),
        OpSpec(
            "token_attention",
            "attention",
            _ATTENTION_BACKENDS,
            "token_attention_backward",
            max_head_dim=_ATTENTION_HEADS,
            flops=_attention_flops,
        ),
        OpSpec(
            "token_attention_backward",
            "attention",
            _ATTENTION_BACKENDS,
            max_head_dim=_ATTENTION_HEADS,
            flops=_attention_backward_flops,
        ),
        OpSpec(
            "lookup_gather",
            "lookup",
            backward="lookup_gather_backward",
            max_head_dim=_LOOKUP_HEADS,
            flops=_lookup_flops,
        ),
        OpSpec("lookup_gather_backward", "lookup", max_head_dim=_LOOKUP_HEADS, flops=_gather_backward_flops),
        OpSpec(
            "lookup_scatter",
            "lookup",
            backward="lookup_scatter_backward",
            max_head_dim=_LOOKUP_HEADS,
            flops=_lookup_flops,
        ),
        OpSpec("lookup_scatter_backward", "lookup", max_head_dim=_LOOKUP_HEADS, flops=_scatter_backward_flops),
        OpSpec("to_csr", "maps", is_integer=True),
        OpSpec("compose", "maps", is_integer=True),
        OpSpec("bipartite_merge", "merge", parts=("bipartite_match", "merge")),
        *(
            OpSpec(name, family, parts=parts, is_registered=False)
            for name, family, parts in (
                ("adaptive_bipartite_match", "match", ("rank_candidates", "count_above_threshold", "build_match_map")),
                ("grid_bipartite_match", "match", ("bipartite_match",)),
                ("importance_match", "match", ("rank_candidates", "build_match_map")),
                ("kth_bipartite_match", "match", ("bipartite_match",)),
                ("merge_wavg", "merge", ("merge",)),
                ("random_bipartite_match", "match", ("bipartite_match",)),
                ("window_match", "windows", ("window_similarity", "window_map")),
            )
        ),
    )
}
# The ops that have kernels.
OPS = tuple(name for name, spec in SPECS.items() if not spec.parts)
