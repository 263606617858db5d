# SPDX-License-Identifier: MIT
"""Token attention by its definition, in float64 with all weights in memory, and bounds of rounding errors."""

import math
from typing import NamedTuple

import pytest
import torch

import tokred_kernels as tk
from tokred_kernels import backends
from tokred_kernels.backends import native

ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IMPORTANCES = ("class", "mean", "last")
# Which of size and policy come.
TERMS = {"plain": (), "size": ("size",), "policy": ("policy",), "both": ("size", "policy")}
# Attention has no kernel in CUDA: on a GPU it is Triton's.
TRITON = pytest.param("triton", marks=pytest.mark.gpu)
KERNELS = pytest.mark.parametrize("backend", ["cpu", TRITON], indirect=True)
# DynamicViT's, models/dyvit.py.
EPS = 1e-6
# Sums over tokens are made of sums over so many.
BLOCK = 24


class Call(NamedTuple):
    """What goes into token attention; the last two may be None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    size: torch.Tensor | None
    policy: torch.Tensor | None

    def map(self, function):
        """The same with `function` of each tensor."""
        return Call(*(None if t is None else function(t) for t in self))

    def leaves(self):
        """Return the same call, detached and with gradients required, and the list of its tensors."""
        made = self.map(lambda t: t.detach().clone(memory_format=torch.preserve_format).requires_grad_())
        return made, [t for t in made if t is not None]

    def run(self, **how):
        """The op's results, as a pair."""
        result = tk.token_attention(self.q, self.k, self.v, size=self.size, policy=self.policy, **how)
        return result if isinstance(result, tuple) else (result, None)


def drawn(shape, dtype, terms=(), rows=None, spread=1.0):
    """Random inputs of `shape`, one of size and policy for each of `rows`; scores of about `spread`."""
    q, k, v = (torch.randn(shape).to(dtype) for _ in range(3))
    rows = (shape[0], shape[2]) if rows is None else rows
    size = torch.randint(1, 9, rows).float() if "size" in terms else None
    policy = torch.rand(rows) if "policy" in terms else None
    if policy is not None:
        policy = torch.where(torch.rand(rows) < 0.6, policy.round(), policy)  # kept, dropped, and between
    return Call((q * spread).to(dtype), k, v, size, policy)


class Parts(NamedTuple):
    """What the weights (B, H, N, N) are made of: (e seen + eps / N) / total, without a policy e / total."""

    e: torch.Tensor
    seen: torch.Tensor
    total: torch.Tensor
    weights: torch.Tensor


def parts_of(call, scale):
    """The weights of a call, and their parts."""
    scores = call.q @ call.k.transpose(-2, -1) * scale
    if call.size is not None:
        scores = scores + call.size.log()[:, None, None, :]
    e = (scores - scores.max(-1, keepdim=True).values).exp()
    if call.policy is None:
        total = e.sum(-1, keepdim=True)
        return Parts(e, torch.ones_like(e), total, e / total)
    tokens = call.q.shape[2]
    seen = torch.where(torch.eye(tokens, dtype=torch.bool), 1.0, call.policy[:, None, None, :])
    total = (e * seen).sum(-1, keepdim=True) + EPS
    return Parts(e, seen, total, (e * seen + EPS / tokens) / total)


def importance_of(weights, importance):
    """(B, N)."""
    rows = {"class": weights[:, :, :1], "mean": weights, "last": weights[:, :, -1:]}[importance]
    return rows.mean((1, 2))


class Exact(NamedTuple):
    """Results and gradients in float64, and of each the sum of the absolute values that it is made of."""

    results: list
    gradients: list
    result_sizes: list
    gradient_sizes: list
    roundings: float  # of the dtype that sums are kept in, of each such value


def exact(call, grad_out, importance=None, grad_importance=None, scale=None):
    """All that the op must give for a call whose gradients are (B, H, N, d) and (B, N)."""
    scale = 1 / math.sqrt(call.q.shape[-1]) if scale is None else scale
    wide, leaves = call.map(lambda t: t.double()).leaves()
    grad_out = grad_out.double()
    parts = parts_of(wide, scale)
    results, grads = [parts.weights @ wide.v], [grad_out]
    if importance:
        results.append(importance_of(parts.weights, importance))
        grads.append(grad_importance.double())
    gradients = torch.autograd.grad(results, leaves, grads)
    with torch.no_grad():
        reached = grad_out.abs() @ wide.v.abs().transpose(-2, -1)
        if importance:
            shared = torch.ones_like(parts.weights).requires_grad_()
            with torch.enable_grad():
                worth = importance_of(shared, importance)
            reached = reached + torch.autograd.grad(worth, shared, grads[1].abs())[0]
        seen = (reached + (parts.weights * reached).sum(-1, keepdim=True)) * parts.e / parts.total
        scores = seen * parts.seen
        if call.policy is not None:  # the highest score of a row gets what the others' gradients lack to add to zero
            scores = scores + (parts.e == 1) * scores.sum(-1, keepdim=True)
        sizes = [scores @ wide.k.abs() * scale, scores.transpose(-2, -1) @ wide.q.abs() * scale]
        sizes.append(parts.weights.transpose(-2, -1) @ grad_out.abs())
        sizes += [] if call.size is None else [scores.sum((1, 2)) / wide.size]
        sizes += [] if call.policy is None else [seen.sum((1, 2))]
        result_sizes = [parts.weights @ wide.v.abs(), *(r.abs() for r in results[1:])]
        # A score that is off by so much moves its weight by as large a part; then come the sums over tokens.
        highest = float((wide.q.abs() @ wide.k.abs().transpose(-2, -1)).max() * scale) if wide.q.numel() else 0.0
    roundings = 2 * highest + BLOCK + call.q.shape[2] / BLOCK
    return Exact([r.detach() for r in results], list(gradients), result_sizes, sizes, roundings)


def accumulator(dtype):
    """What sums are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_rounded(actual, exact, size, roundings, dtype):
    """`actual` is `exact`, rounded to its dtype, after sums in float32 (float64) of values whose sizes add to `size`.

    Triton, and the CPU's AMX tiles in bfloat16, round weights to `dtype` before they multiply them.
    """
    backend = backends.choose("token_attention", actual)
    rounds = backend == "triton" or (backend == "cpu" and dtype == torch.bfloat16 and native.AMX)
    inner = roundings * torch.finfo(accumulator(dtype)).eps + (torch.finfo(dtype).eps if rounds else 0)
    off = (actual.cpu().double() - exact).abs()
    bound = torch.finfo(actual.dtype).eps * exact.abs() + inner * size + torch.finfo(actual.dtype).tiny
    if actual.dtype == torch.float16:
        bound = bound + 2.0**-24  # its smallest number
    assert actual.shape == exact.shape
    assert torch.isfinite(actual).all()
    assert (off <= bound).all(), f"off by up to {(off / bound).max():.3g} times what rounding explains"


def check(call, where, importance=None, scale=None, move=None, **how):
    """The op's results and gradients at `call`, on device `where`, are those of the definition.

    `move` makes of a tensor on the device what is passed, such as one with other strides.
    """
    dtype = call.q.dtype
    grad_out = torch.randn(call.q.shape).to(dtype)
    grad_importance = torch.randn(call.q.shape[0], call.q.shape[2]) if importance else None
    truth = exact(call, grad_out, importance, grad_importance, scale)
    moved, leaves = call.map(lambda t: t.to(where)).leaves()
    passed = moved if move is None else moved._replace(q=move(moved.q), k=move(moved.k), v=move(moved.v))
    results = [result for result in passed.run(importance=importance, scale=scale, **how) if result is not None]
    assert results[0].dtype == dtype
    assert results[-1].dtype == (dtype if not importance else accumulator(dtype))
    grads = [grad_out.to(where)] if not importance else [grad_out.to(where), grad_importance.to(results[1])]
    for got, want, size in zip(results, truth.results, truth.result_sizes, strict=True):
        assert_rounded(got, want, size, truth.roundings, dtype)
    gradients = torch.autograd.grad(results, leaves, grads)
    for got, want, size in zip(gradients, truth.gradients, truth.gradient_sizes, strict=True):
        assert_rounded(got, want, size, truth.roundings, dtype)
