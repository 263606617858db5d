# SPDX-License-Identifier: MIT
"""Scatter alone; chained with the gather before it, values and gradients are tested in test_lookup_gather.py."""

import pytest
import torch
from dense_lookup import ALL_DTYPES, LARGE, SHAPES, assert_close, drawn, loss
from support import slow

import tokred_kernels as tk


def dense_scatter(q, k, values, lse):
    """With weights that need not sum to 1: lse is what it is given."""
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 - lse[..., None]).exp()
    return weights.transpose(-2, -1) @ values


def inputs(shape, dtype=torch.float32, device="cpu"):
    call = drawn(shape, dtype, device)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    lse = (call.q.double() @ call.k.double().transpose(-2, -1) * shape[-1] ** -0.5).logsumexp(-1)
    return call.q, call.k, call.values, (lse + torch.rand_like(lse)).to(accumulator)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *slow((LARGE,))], ids=str)
def test_equals_float64_with_the_gradient_of_lse(device, shape, dtype):
    own = [t.requires_grad_() for t in inputs(shape, dtype, device)]
    exact = [t.detach().double().requires_grad_() for t in own]
    got, want = tk.lookup_scatter(*own), dense_scatter(*exact)
    assert_close(got, want)
    gradients = torch.autograd.grad(loss([got], 1), own)
    for g, w in zip(gradients, torch.autograd.grad(loss([want], 1), exact), strict=True):
        torch.testing.assert_close(
            g.double(), w, rtol=0, atol=float(w.abs().max()) * {4: 2e-5, 8: 1e-12, 2: 2e-2}[own[0].element_size()]
        )


def test_weights_of_an_lse_that_is_too_low_are_large():
    q, k, values, lse = inputs((1, 1, 3, 9, 8))
    exact = dense_scatter(q.double(), k.double(), values.double(), lse.double() - 20)
    torch.testing.assert_close(tk.lookup_scatter(q, k, values, lse - 20).double(), exact, rtol=1e-4, atol=1e3)
    assert tk.lookup_scatter(q, k, values.abs(), lse - 200).isinf().all()


def test_second_derivatives_raise():
    parts = [t.requires_grad_() for t in inputs((1, 1, 2, 5, 4))]
    out = tk.lookup_scatter(*parts)
    (gradient,) = torch.autograd.grad(out.square().sum(), parts[0], create_graph=True)
    with pytest.raises(RuntimeError, match="lookup_scatter: second derivatives are not supported"):
        gradient.sum().backward()


BAD = {
    "lse of another shape": (lambda lse: lse[..., :1], ValueError, r"lse must be \(2, 2, 3\) as q is"),
    "lse of another dtype": (lambda lse: lse.double(), TypeError, "lse must be torch.float32 as q is torch.float32"),
    "no lse": (lambda lse: None, TypeError, "lse must be a torch.Tensor, got NoneType"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_lse_names_the_argument(name):
    q, k, values, lse = inputs((2, 2, 3, 9, 8))
    change, error, words = BAD[name]
    with pytest.raises(error, match="tokred_kernels.lookup_scatter: " + words):
        tk.lookup_scatter(q, k, values, change(lse))


def test_other_bad_input_names_the_argument():
    q, k, values, lse = inputs((2, 2, 3, 9, 8))
    with pytest.raises(ValueError, match=r"lookup_scatter: v must be \(2, 2, 3, 8\), got \(2, 2, 2, 8\)"):
        tk.lookup_scatter(q, k, values[:, :, 1:], lse)
    with pytest.raises(ValueError, match="lookup_scatter: q must have from 1 to N = 2 tokens"):
        tk.lookup_scatter(q, k[:, :, :2], values, lse)
