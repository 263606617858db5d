# SPDX-License-Identifier: MIT
"""Who computes a case: the published chain, the same chain compiled, a plain copy, and each backend of this package."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import tokred_kernels as tk
from benchmarks import attention, published, published_algm, published_others
from benchmarks.cases import ADAPTIVE_OPS, Case
from benchmarks.families import family
from benchmarks.inputs import Inputs
from tokred_kernels import backends

PUBLISHED, COMPILED, CLONE = "published", "compiled", "clone"
FUSED, FLEX = "fused", "flex"  # torch's own attentions: with no term but the scores, and with sizes
BASELINES = (PUBLISHED, COMPILED, CLONE, FUSED, FLEX)
YARDSTICKS = (CLONE, FUSED)  # which compute something else
REFERENCE = "reference"  # says what is right, and is asked for no speed
# Why kernels did not pass the self-check, by backend and op; see `machine.failures`.
Failed = Mapping[tuple[str, str], str]
NONE_FAILED: Failed = {}

# What a case's rows run on, by the names that the backends know.
KERNEL_OPS = {
    "bipartite_match": ("bipartite_match",),
    "kth_bipartite_match": ("bipartite_match",),
    "random_bipartite_match": ("bipartite_match",),
    "merge": ("merge",),
    "merge_wavg": ("merge",),
    "unmerge": ("unmerge",),
    "bipartite_merge": ("bipartite_match", "merge"),
    "window_match": ("window_similarity", "window_map"),
    "window_merge": ("window_similarity", "window_map", "merge"),
    "adaptive_bipartite_match": ("rank_candidates", "count_above_threshold", "build_match_map"),
    "grid_bipartite_match": ("bipartite_match",),
    "importance_match": ("rank_candidates", "build_match_map"),
    "keep_topk": ("keep_topk", "merge"),
    "token_attention": ("token_attention",),
    "lookup_gather": ("lookup_gather",),
    "lookup_scatter": ("lookup_gather", "lookup_scatter"),
    "then": ("compose",),
    "to_csr": ("to_csr",),
}
BACKWARD_OPS = {
    "merge": ("merge_backward",),
    "merge_wavg": ("merge_backward",),
    "unmerge": ("merge",),
    "token_attention": ("token_attention_backward",),
    "lookup_gather": ("lookup_gather_backward",),
    "lookup_scatter": ("lookup_gather_backward", "lookup_scatter_backward"),
}


def chain(case: Case) -> tuple[Callable[..., Any], Callable[[Inputs], tuple[Any, ...]]] | None:
    """The published chain as a function of tensors, and the arguments it takes; None where nothing is published."""
    own = family(case)
    if own is not None:
        return own.chain(case)
    r, mode, window, grid = case.r, case.reduce, case.window, case.grid
    kept = case.shape[1] - r

    def bipartite_merge(metric: Tensor, x: Tensor, size: Tensor) -> tuple[published.Plan, Tensor, Tensor]:
        plan = published.bipartite_plan(metric, r, class_token=True)
        return plan, *published.merge_wavg(plan.merge, x, size)

    def window_merge(x: Tensor, threshold: float) -> tuple[published.Plan, Tensor, Tensor]:
        plan = published_algm.window_plan(x, threshold, window)
        return plan, *published.merge_wavg(plan.merge, x)

    def importance_match(metric: Tensor) -> tuple[published.Plan, Tensor]:
        return published_others.importance_plan(_heads_averaged(metric), kept)

    return {
        "bipartite_match": (lambda m: published.bipartite_plan(m, r, class_token=True), lambda i: (i.metric,)),
        "kth_bipartite_match": (lambda m: published.kth_plan(m, r), lambda i: (i.metric,)),
        "random_bipartite_match": (lambda m: published.random_plan(m, r), lambda i: (i.metric,)),
        "merge": (lambda p, x: p.merge(x, mode), lambda i: (i.plan, i.x)),
        "merge_wavg": (
            lambda p, x, s: published.merge_wavg(p.merge, x, s),
            lambda i: (i.plan, i.x, i.size_as_x),
        ),
        "unmerge": (lambda p, y: p.unmerge(y), lambda i: (i.plan, i.y)),
        "bipartite_merge": (bipartite_merge, lambda i: (i.metric, i.x, i.size_as_x)),
        "window_match": (lambda x, t: published_algm.window_plan(x, t, window), lambda i: (i.x, i.threshold)),
        "window_merge": (window_merge, lambda i: (i.x, i.threshold)),
        "adaptive_bipartite_match": (
            lambda m, layer: published_algm.adaptive_plan(m, layer, class_token=True),
            lambda i: (i.metric, i.layer_index),
        ),
        "grid_bipartite_match": (lambda m: published_others.grid_plan(m, r, grid, window), lambda i: (i.metric,)),
        "importance_match": (importance_match, lambda i: (i.metric,)),
        "then": (
            lambda p, x, source: published.merge_source(p.merge, x, source),
            lambda i: (i.second_plan, i.y, i.source),
        ),
    }.get(case.op)


def ours(case: Case) -> Callable[[Inputs], Any]:
    """Return the package's own call. `Provider.scope` sets the backend around it."""
    r, reduce, window, grid = case.r, case.reduce, case.window, case.grid
    kept = case.shape[1] - r
    own = family(case)
    if own is not None:
        return own.ours(case)

    def window_merge(i: Inputs) -> tk.MergeOutput:
        token_map = tk.window_match(i.x, i.threshold, window=window, num_prefix=1)
        return tk.MergeOutput(*tk.merge_wavg(i.x, token_map), token_map)

    return {
        "bipartite_match": lambda i: tk.bipartite_match(i.metric, r, class_token=True),
        "kth_bipartite_match": lambda i: tk.kth_bipartite_match(i.metric, r),
        "random_bipartite_match": lambda i: tk.random_bipartite_match(i.metric, r),
        "merge": lambda i: tk.merge(i.x, i.token_map, reduce=reduce),
        "merge_wavg": lambda i: tk.merge_wavg(i.x, i.token_map, i.size),
        "unmerge": lambda i: tk.unmerge(i.y, i.token_map),
        "bipartite_merge": lambda i: tk.bipartite_merge(i.x, r, metric=i.metric, size=i.size, class_token=True),
        "window_match": lambda i: tk.window_match(i.x, i.threshold, window=window, num_prefix=1),
        "window_merge": window_merge,
        "adaptive_bipartite_match": lambda i: tk.adaptive_bipartite_match(
            i.metric, layer_index=i.layer_index, class_token=True
        ),
        "grid_bipartite_match": lambda i: tk.grid_bipartite_match(i.metric, r, grid=grid, stride=window),
        "importance_match": lambda i: tk.importance_match(i.metric, kept, class_token=True),
        "then": lambda i: i.token_map.then(i.second_map),
        "to_csr": lambda i: tk.TokenMap._trusted(i.token_map.dest, i.token_map.num_out).views(),
    }[case.op]


@dataclass(frozen=True)
class Provider:
    """One column of a comparison: what runs, and under which backend."""

    name: str
    run: Callable[[Inputs], Any]
    backend: str | None = None

    @contextmanager
    def scope(self, training: bool) -> Iterator[None]:
        """Everything that is set around the calls rather than by them."""
        chosen = tk.use_backend(self.backend) if self.backend else nullcontext()
        with chosen, torch.set_grad_enabled(training):
            yield


def providers(case: Case, chosen: list[str], compile_chain: bool, failed: Failed = NONE_FAILED) -> list[Provider]:
    """Return the baselines, then those of the `chosen` backends that can run the case and have not failed its ops.

    An adaptive count is read back to the host, where a compiled chain falls into parts; it is compiled anew for each
    count. So on a GPU, where inputs of several counts rotate, such a chain has no compiled form.
    """
    found = []
    published_chain = chain(case)
    if published_chain is not None:
        function, arguments = published_chain
        found.append(Provider(PUBLISHED, lambda i: function(*arguments(i))))
        in_parts = case.op in ADAPTIVE_OPS
        if compile_chain and not (in_parts and case.device == "cuda"):
            torch._dynamo.reset()  # all cases share these few code objects, and would use up their recompilations
            if in_parts:  # each place where it falls apart would be told at length
                logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
            compiled = torch.compile(function, fullgraph=not in_parts, dynamic=False)
            found.append(Provider(COMPILED, lambda i: compiled(*arguments(i))))
    if case.op in ("merge", "merge_wavg", "unmerge", "window_merge") and not case.training:
        found.append(Provider(CLONE, lambda i: (i.y if case.op == "unmerge" else i.x).clone()))
    if case.op == "token_attention":
        found.append(Provider(FUSED, attention.fused))
        flex = attention.flex(case) if compile_chain else None
        found += [Provider(FLEX, flex)] if flex else []
    if any(target.measure == "speedup_reference" for target in case.targets):  # then it is a baseline, asked for or not
        chosen = list(dict.fromkeys([REFERENCE, *chosen]))
    found += [Provider(name, ours(case), name) for name in chosen if reason_against(case, name, failed) is None]
    if case.training:
        own = family(case)
        backward = own.with_backward if own is not None else partial(_with_backward, case)
        found = [Provider(p.name, backward(p.run), p.backend) for p in found]
    return found


def reason_against(case: Case, backend: str, failed: Failed = NONE_FAILED) -> str | None:
    """Return why a backend cannot run a case, or must not, as its kernels did not pass the self-check; else None."""
    for op in KERNEL_OPS[case.op] + (BACKWARD_OPS[case.op] if case.training else ()):
        reason = backends.can_run(op, backend, case.device, getattr(torch, case.dtype))
        reason = reason or failed.get((backend, op))
        if reason is not None:
            return reason
    return None


def _with_backward(case: Case, forward: Callable[[Inputs], Any]) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    def run(i: Inputs) -> tuple[Tensor, Tensor]:
        output = forward(i)
        moved = output if isinstance(output, Tensor) else output[0]
        (gradient,) = torch.autograd.grad(moved, i.y if case.op == "unmerge" else i.x, i.grad)
        return moved.detach(), gradient

    return run


def _heads_averaged(metric: Tensor) -> Tensor:
    """Models do this before they call the published function."""
    return metric.mean(1) if metric.dim() == 4 else metric
