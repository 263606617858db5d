# SPDX-License-Identifier: MIT
"""Lookup attention by its definition, in float64 with all weights in memory, and what its tests share."""

from typing import NamedTuple

import torch
from support import slow

import tokred_kernels as tk

ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# (B, H, M, N, d): one of each, odd ones, as many compressed as lookup tokens, past a block of keys and past a chunk.
SHAPES = [
    *(
        (1, 1, 1, 1, 1),
        (2, 3, 2, 3, 8),
        (1, 1, 17, 17, 32),
        (1, 2, 17, 33, 40),
        (1, 1, 65, 66, 64),
        (1, 1, 3, 130, 128),
    ),
    *slow(((1, 2, 25, 577, 64),), ((1, 1, 100, 241, 40),), ((1, 1, 25, 200, 100),)),
]
LARGE = (1, 2, 9, 4100, 16)
# Relative to the largest value, of one rounding and of sums in float32. 16-bit weights are rounded once on a GPU.
BOUND = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


class Call(NamedTuple):
    """q (B, H, M, d), k and v (B, H, N, d), values (B, H, M, d) that are scattered."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    values: torch.Tensor

    def exact(self):
        """The same in float64, with gradients asked for."""
        return Call(*(t.detach().double().requires_grad_() for t in self))

    def leaves(self):
        """The same, detached, in their own layout and with gradients asked for."""
        return Call(*(t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in self))


def drawn(shape, dtype=torch.float32, device="cpu", spread=1.0):
    batch, heads, compressed, tokens, channels = shape
    rows = (compressed, tokens, tokens, compressed)
    made = (torch.randn(batch, heads, number, channels, device=device).to(dtype) for number in rows)
    q, k, v, values = made
    return Call((q * spread).to(dtype), k, v, values)


def dense(call, scale=None, detach_lse=False):
    """Gathered, lse and scattered; without the gradient of scattered by way of lse if `detach_lse`."""
    scale = call.q.shape[-1] ** -0.5 if scale is None else scale
    scores = call.q @ call.k.transpose(-2, -1) * scale
    lse = scores.logsumexp(-1)
    weights = (scores - (lse.detach() if detach_lse else lse)[..., None]).exp()
    return scores.softmax(-1) @ call.v, lse, weights.transpose(-2, -1) @ call.values


def fused(call, scale=None):
    out, lse = tk.lookup_gather(call.q, call.k, call.v, scale=scale)
    return out, lse, tk.lookup_scatter(call.q, call.k, call.values, lse, scale=scale)


def loss(results, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.device) for r in results)
    return sum((r.double() * w).sum() for r, w in zip(results, weights, strict=True))


def assert_close(got, exact, slack=0.0):
    """`got` is `exact` to within its dtype's bound, and the absolute error `slack`."""
    largest = exact.abs().max().clamp(min=1e-3)
    worst = ((got.double() - exact).abs().max() - slack) / largest
    assert worst <= BOUND[got.dtype], f"off by {worst:.3g} of the largest"


def check(call, scale=None, rounding=0.0):
    """Results and all gradients, of gather and scatter chained, equal float64.

    Gradients by way of lse cancel others: `rounding` is an error relative to those others.
    """
    own, exact = call.leaves(), call.exact()
    got, want = fused(own, scale), dense(exact, scale)
    for g, w in zip(got, want, strict=True):
        if g.dtype == torch.float32 and call.q.dtype in (torch.float16, torch.bfloat16):
            torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)  # lse
        else:
            assert_close(g, w)
    results = (got, own), (want, exact), (dense(exact, scale, detach_lse=True), exact)
    gradients = (torch.autograd.grad(loss(outputs, 1), inputs) for outputs, inputs in results)
    for g, w, other in zip(*gradients, strict=True):
        assert g.shape == w.shape
        assert_close(g, w, slack=rounding * other.abs().max())
