# SPDX-License-Identifier: MIT
"""Token attention by its definition, in float64 with all weights in memory, and how far from it rounding may lead."""

import math
from typing import NamedTuple

import pytest
import torch

import tokred_kernels as tk

ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IMPORTANCES = ("class", "mean", "last")
# Which of size and policy come.
TERMS = {"plain": (), "size": ("size",), "policy": ("policy",), "both": ("size", "policy")}
# Attention has no kernel in CUDA: on a GPU it is Triton's.
TRITON = pytest.param("triton", marks=pytest.mark.gpu)
KERNELS = pytest.mark.parametrize("backend", ["cpu", TRITON], indirect=True)
ANYWHERE = pytest.mark.parametrize("everywhere", ["reference", "cpu", TRITON], indirect=True)
# DynamicViT's, models/dyvit.py.
EPS = 1e-6
# Roundings of float32 that a result may be off by, in units of all that was added up to make it.
ROUNDINGS = 32


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
        """The same, detached and with gradients asked for, and the list of what is there."""
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


def weights_of(call, scale):
    """e m before it is divided, what it is divided by, and the weights: (B, H, N, N), (B, H, N, 1), (B, H, N, N)."""
    scores = call.q @ call.k.transpose(-2, -1) * scale
    if call.size is not None:
        scores = scores + call.size.log()[:, None, None, :]
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    if call.policy is None:
        total = e.sum(-1, keepdim=True)
        return e, total, e / total
    tokens = call.q.shape[2]
    own = torch.eye(tokens, dtype=torch.bool, device=e.device)
    e = e * torch.where(own, 1.0, call.policy[:, None, None, :])
    total = e.sum(-1, keepdim=True) + EPS
    return e, total, (e + EPS / tokens) / total


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


def exact(call, grad_out, importance=None, grad_importance=None, scale=None):
    """All that the op must give for a call whose gradients are (B, H, N, d) and (B, N)."""
    scale = 1 / math.sqrt(call.q.shape[-1]) if scale is None else scale
    wide, leaves = call.map(lambda t: t.double()).leaves()
    e, total, weights = weights_of(wide, scale)
    results = [weights @ wide.v]
    loss = (results[0] * grad_out.double()).sum()
    if importance:
        results.append(importance_of(weights, importance))
        loss = loss + (results[1] * grad_importance.double()).sum()
    # The maximum is a constant in e m / total, but for the eps.
    gradients = torch.autograd.grad(loss, leaves)
    with torch.no_grad():
        reached = grad_out.double().abs() @ wide.v.abs().transpose(-2, -1)
        if importance:
            share = torch.zeros_like(weights)
            rows = {"class": slice(0, 1), "mean": slice(None), "last": slice(-1, None)}[importance]
            share[:, :, rows] = grad_importance.double().abs()[:, None, None, :]
            reached = reached + share / (weights.shape[1] * (weights.shape[2] if importance == "mean" else 1))
        both = (reached + (weights * reached).sum(-1, keepdim=True)) / total
        scores = both * e
        if call.policy is not None:  # the highest score of a row gets what the sum of the others lacks
            scores = scores + (e == e.amax(-1, keepdim=True)) * scores.sum(-1, keepdim=True)
        sizes = [scores @ wide.k.abs() * scale, scores.transpose(-2, -1) @ wide.q.abs() * scale]
        sizes.append(weights.transpose(-2, -1) @ grad_out.double().abs())
        if call.size is not None:
            sizes.append(scores.sum((1, 2)) / wide.size)
        if call.policy is not None:
            seen = wide._replace(policy=torch.ones_like(wide.policy))
            sizes.append((both * weights_of(seen, scale)[0]).sum((1, 2)))
        result_sizes = [weights @ wide.v.abs(), *(r.abs() for r in results[1:])]
    return Exact([r.detach() for r in results], list(gradients), result_sizes, sizes)


def assert_rounded(actual, exact, size, dtype, where):
    """`actual` is `exact`, rounded to its dtype, after sums in float32 (float64) of values whose sizes add to `size`.

    On a GPU weights are rounded to `dtype` before they are multiplied.
    """
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    inner = ROUNDINGS * torch.finfo(kept).eps + (torch.finfo(dtype).eps if where == "cuda" else 0)
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
    out, worth = passed.run(importance=importance, scale=scale, **how)
    assert out.dtype == dtype
    assert_rounded(out, truth.results[0], truth.result_sizes[0], dtype, where)
    loss = [out, grad_out.to(where)], *([[worth, grad_importance.to(worth)]] if importance else [])
    if importance:
        assert worth.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_rounded(worth, truth.results[1], truth.result_sizes[1], dtype, where)
    gradients = torch.autograd.grad(*zip(*loss, strict=True), leaves) if False else torch.autograd.grad(
        [result for result, _ in loss], leaves, [grad for _, grad in loss]
    )
    for got, want, size in zip(gradients, truth.gradients, truth.gradient_sizes, strict=True):
        assert_rounded(got, want, size, dtype, where)
