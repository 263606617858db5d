# SPDX-License-Identifier: MIT
"""Who computes a case: the published chain, the same chain compiled, a plain copy, and each backend of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokred_kernels as tk
from benchmarks import published, traffic
from benchmarks.cases import Case
from tokred_kernels import backends

PUBLISHED, COMPILED, CLONE = "published", "compiled", "clone"
BASELINES = (PUBLISHED, COMPILED, CLONE)
LARGEST_SIZE = 4  # tokens stand for 1 to 4 first tokens, as after some layers; exact in every dtype

# What a case's rows run on, by the names that the backends know: every one of these must be able to serve.
KERNEL_OPS = {
    "bipartite_match": ("bipartite_match",),
    "kth_bipartite_match": ("bipartite_match",),
    "random_bipartite_match": ("bipartite_match",),
    "merge": ("merge",),
    "merge_wavg": ("merge",),
    "unmerge": ("unmerge",),
    "bipartite_merge": ("bipartite_match", "merge"),
    "then": ("compose",),
    "invert": ("invert",),
}
BACKWARD_OPS = {"merge": ("merge_backward",), "merge_wavg": ("merge_backward",), "unmerge": ("merge",)}


@dataclass
class Inputs:
    """What the providers of one case are given: all of them the same tensors, on the same map.

    Shapes: metric (B, N, D) or (B, H, N, d); x (B, N, C); size (B, N, 1) float32, and as the published code has it, in
    x's dtype; y (B, N', C); source (B, N', N); grad is what flows back, shaped as the op's output.
    """

    metric: Tensor
    x: Tensor
    size: Tensor
    size_as_x: Tensor
    plan: published.Plan
    token_map: tk.TokenMap
    y: Tensor
    grad: Tensor | None = None
    second_plan: published.BipartitePlan | None = None
    second_map: tk.TokenMap | None = None
    source: Tensor | None = None


def draw(case: Case, seed: int) -> Inputs:
    """Fresh random inputs; no zeros, which hide unwritten outputs and can run faster than real data."""
    generator = torch.Generator(case.device).manual_seed(seed)
    batch, tokens, channels = case.shape
    dtype, out = getattr(torch, case.dtype), traffic.slots(case)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=case.device).to(dtype)

    keys = (case.heads, tokens, case.metric_dim) if case.heads else (tokens, case.metric_dim)
    metric, x = normal(batch, *keys), normal(batch, tokens, channels)
    size = torch.randint(1, LARGEST_SIZE + 1, (batch, tokens, 1), generator=generator, device=case.device).float()
    plan = _plan(case, metric)
    dest = published.destinations(plan, out, tokens)
    token_map = tk.TokenMap.from_dest(dest, out)
    inputs = Inputs(metric, x, size, size.to(dtype), plan, token_map, normal(batch, out, channels))
    token_map.views()  # a selector leaves a map with both views; making them is not the movers' work
    if case.training:
        moved = inputs.y if case.op == "unmerge" else inputs.x
        moved.requires_grad_()
        inputs.grad = normal(batch, tokens if case.op == "unmerge" else out, channels)
    if case.op == "then":
        inputs.second_plan = published.bipartite_plan(normal(batch, out, case.metric_dim), case.r, class_token=True)
        last = out - case.r
        inputs.second_map = tk.TokenMap.from_dest(published.destinations(inputs.second_plan, last, out), last)
        inputs.source = published.merge_source(plan.merge, x)
    return inputs


def _plan(case: Case, metric: Tensor) -> published.Plan:
    if case.op == "kth_bipartite_match":
        return published.kth_plan(metric, case.r)
    if case.op == "random_bipartite_match":
        return published.random_plan(metric, case.r)
    return published.bipartite_plan(metric, case.r, class_token=True)


def chain(case: Case) -> tuple[Callable[..., Any], Callable[[Inputs], tuple[Any, ...]]] | None:
    """The published chain as a function of tensors, and the arguments it takes; None where nothing is published."""
    r, mode = case.r, case.reduce

    def bipartite_merge(metric: Tensor, x: Tensor, size: Tensor) -> tuple[published.Plan, Tensor, Tensor]:
        plan = published.bipartite_plan(metric, r, class_token=True)
        return plan, *published.merge_wavg(plan.merge, x, size)

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
        "then": (
            lambda p, x, source: published.merge_source(p.merge, x, source),
            lambda i: (i.second_plan, i.y, i.source),
        ),
    }.get(case.op)


def ours(case: Case, backend: str) -> Callable[[Inputs], Any]:
    """The package's own call; which backend serves it is set around it, by `scope`."""
    r, reduce = case.r, case.reduce
    if case.op in ("then", "invert"):
        return _whole_numbers(case, backend)
    return {
        "bipartite_match": lambda i: tk.bipartite_match(i.metric, r, class_token=True),
        "kth_bipartite_match": lambda i: tk.kth_bipartite_match(i.metric, r),
        "random_bipartite_match": lambda i: tk.random_bipartite_match(i.metric, r),
        "merge": lambda i: tk.merge(i.x, i.token_map, reduce=reduce),
        "merge_wavg": lambda i: tk.merge_wavg(i.x, i.token_map, i.size),
        "unmerge": lambda i: tk.unmerge(i.y, i.token_map),
        "bipartite_merge": lambda i: tk.bipartite_merge(i.x, r, metric=i.metric, size=i.size, class_token=True),
    }[case.op]


def _whole_numbers(case: Case, backend: str) -> Callable[[Inputs], Any]:
    """Composing and inverting, which `use_backend` does not govern: a backend other than the best is called itself."""
    op = KERNEL_OPS[case.op][0]
    if backends.best(op, torch.empty(0, dtype=torch.int32, device=case.device)) == backend:
        if op == "compose":
            return lambda i: i.token_map.then(i.second_map)
        return lambda i: tk.TokenMap(i.token_map.dest, i.token_map.num_out).views()
    function = backends.implementation(backend, op)
    if op == "compose":
        return lambda i: tk.TokenMap(function(i.token_map.dest, i.second_map.dest), i.second_map.num_out)
    return lambda i: function(i.token_map.dest, i.token_map.num_out)


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


def providers(case: Case, chosen: list[str], compile_chain: bool) -> list[Provider]:
    """Baselines first, then those of the `chosen` backends that can serve the case."""
    found = []
    published_chain = chain(case)
    if published_chain is not None:
        function, arguments = published_chain
        found.append(Provider(PUBLISHED, lambda i: function(*arguments(i))))
        if compile_chain:
            torch._dynamo.reset()  # all cases share these few code objects, and would use up their recompilations
            compiled = torch.compile(function, fullgraph=True, dynamic=False)
            found.append(Provider(COMPILED, lambda i: compiled(*arguments(i))))
    if case.op in ("merge", "merge_wavg", "unmerge") and not case.training:
        found.append(Provider(CLONE, lambda i: (i.y if case.op == "unmerge" else i.x).clone()))
    found += [Provider(name, ours(case, name), name) for name in chosen if reason_against(case, name) is None]
    if case.training:
        found = [Provider(p.name, _with_backward(case, p.run), p.backend) for p in found]
    return found


def reason_against(case: Case, backend: str) -> str | None:
    """Why a backend cannot run a case; None where it can."""
    ops = KERNEL_OPS[case.op] + (BACKWARD_OPS[case.op] if case.training else ())
    for op in ops:
        reason = backends.reason_against(op, backend, case.device, getattr(torch, case.dtype))
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
