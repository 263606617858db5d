# SPDX-License-Identifier: MIT
"""Lookup attention in Triton against float64 with all weights in memory; conftest.py says where it runs."""

import math

import pytest
import torch
import torch.nn.functional as F
from dense_lookup import Call, assert_close, check, dense, drawn, fused, loss
from support import DTYPES

import tokred_kernels as tk
from tokred_kernels.ops import lookup_gather as ops

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (B, H, M, N, d): one of each; a pair; past a block of queries or keys, and as many of both; past two splits.
SHAPES = [
    *((1, 1, 1, 1, 8), (2, 2, 2, 3, 32), (1, 1, 17, 33, 40), (1, 1, 65, 65, 1), (1, 1, 25, 200, 128)),
    (1, 1, 1, 385, 64),
]
# Two splits of each head in float32, where those may be of few keys.
SPLIT = (2, 2, 5, 40, 16)


@pytest.fixture
def small_splits(device, monkeypatch):
    from tokred_kernels.backends.triton import configs_attention

    monkeypatch.setattr(configs_attention, "LOOKUP_SPLIT_KEYS", 16)


def every_gradient(call):
    """What `fused` gives, and the gradients of `call` by all of it."""
    own = call.leaves()
    results = fused(own)
    return [*results, *torch.autograd.grad(loss(results, 2), own)]


def assert_same(got, expected, name=""):
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(one, other), f"result {number} {name}"


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64_with_all_gradients(device, shape, dtype):
    check(drawn(shape, dtype, device))


@dtypes
@pytest.mark.parametrize("shape", [(2, 1, 3, 9, 8), (1, 1, 34, 257, 24)], ids=str)
def test_scatter_alone(device, shape, dtype):
    # Of an lse that is its own: weights need not sum to 1.
    own, scale = drawn(shape, dtype, device), shape[-1] ** -0.5
    level = (own.q.double() @ own.k.double().transpose(-2, -1) * scale).logsumexp(-1)
    own = [t.requires_grad_() for t in (own.q, own.k, own.values, (level + torch.rand_like(level)).float())]
    exact = [t.detach().double().requires_grad_() for t in own]
    got = tk.lookup_scatter(*own)
    weights = (exact[0] @ exact[1].transpose(-2, -1) * scale - exact[3][..., None]).exp()
    want = weights.transpose(-2, -1) @ exact[2]
    assert_close(got, want)
    gradients = torch.autograd.grad(loss([got], 1), own)
    for number, other in enumerate(torch.autograd.grad(loss([want], 1), exact)):
        if number == 3:  # its own dtype is float32, what it is summed from is not
            band = float(other.abs().max()) * {4: 2e-5, 2: 2e-2}[dtype.itemsize]
            torch.testing.assert_close(gradients[3].double(), other, rtol=0, atol=band)
        else:
            assert_close(gradients[number], other)


@pytest.mark.parametrize("of_lse", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 3, 9, 8), (1, 1, 34, 257, 24)], ids=str)
def test_gradients_by_one_result_of_the_gather(device, shape, of_lse):
    call = drawn(shape, device=device)
    own, exact = call.leaves(), call.exact()
    got = torch.autograd.grad(loss([tk.lookup_gather(*own[:3])[of_lse]], 3), own[:3])
    want = torch.autograd.grad(loss([dense(exact)[of_lse]], 3), exact[:3], allow_unused=True)
    for one, other in zip(got, want, strict=True):
        assert_close(one, torch.zeros_like(one).double() if other is None else other)


@dtypes
def test_blocks_of_other_sizes_and_many_splits(small_splits, device, dtype, monkeypatch):
    from tokred_kernels.backends.triton import lookup_gather, lookup_gradients, lookup_scatter
    from tokred_kernels.backends.triton.configs_tables import AttentionConfig

    for queries, keys in ((16, 32), (32, 16)):
        config = AttentionConfig(queries, keys, 16, 4, 1)
        for module in (lookup_gather, lookup_gradients, lookup_scatter):
            monkeypatch.setattr(module, "lookup_config", lambda *_, config=config: config)
        check(drawn((1, 1, 18, 67, 9), dtype, device))


@pytest.mark.parametrize("shape", [(1, 1, 3, 300, 64), (1, 1, 100, 300, 64), (1, 2, 65, 130, 128)], ids=str)
def test_blocks_of_another_architecture(device, shape, monkeypatch):
    from tokred_kernels.backends.triton import lookup_gather, lookup_gradients, lookup_scatter
    from tokred_kernels.backends.triton.configs_tables import PORTABLE

    other = "sm_90" if device == "cpu" else PORTABLE
    for module in (lookup_gather, lookup_gradients, lookup_scatter):
        monkeypatch.setattr(module, "architecture_of", lambda _: other)
    check(drawn(shape, torch.float16, device))


def test_a_scale_of_its_own(small_splits, device):
    check(drawn((1, 1, 3, 40, 16), device=device), scale=0.7)


def test_scores_of_large_spread(device):
    check(drawn((1, 1, 5, 257, 32), device=device, spread=20.0))


def test_a_split_far_above_all_others(small_splits, device):
    call = drawn((1, 1, 3, 160, 8), device=device)
    call.q[..., 0] = 4.0
    for token in (0, 100, 159):
        call.k[..., 0] = 0.0
        call.k[0, 0, token, 0] = 40.0
        # A score is off by at most 8 roundings, one a channel, and a weight by the same factor of its exponential.
        check(call, rounding=8 / 2 * torch.finfo(torch.float32).eps * dense(call)[1].abs().max())


def test_scores_so_low_that_keys_beyond_the_last_would_count(device):
    # Those are 0, of a weight that float32 does not hold, and that times 0 is NaN.
    call = drawn((1, 1, 3, 33, 8), device=device)
    call.q[..., 0], call.k[..., 0] = 20.0, -16.0
    assert dense(call)[1].max() < -90
    check(call)


LAYOUTS = {
    "heads beside channels": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "channels apart": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "not aligned": lambda t: F.pad(t, (3, 5, 1, 2))[:, :, 1:-2, 3:-5],
}


def test_reads_tokens_as_they_lie(small_splits, device):
    call = drawn(SPLIT, device=device)
    expected = every_gradient(call)
    for name, layout in LAYOUTS.items():
        assert_same(every_gradient(Call(*map(layout, call))), expected, name)


def test_expanded_tensors(small_splits, device):
    expanded = Call(*(t.expand(2, 2, -1, -1) for t in drawn((1, 1, 4, 40, 8), device=device)))
    own, copied = ([t.detach().requires_grad_() for t in c] for c in (expanded, map(torch.clone, expanded)))
    got, same = (torch.autograd.grad(sum(r.sum() for r in fused(Call(*c))), c) for c in (own, copied))
    assert_same(got, same)


def test_heads_join_without_a_copy(small_splits, device):
    own = drawn(SPLIT, device=device).leaves()
    results = fused(own)
    for result in (results[0], results[2], *torch.autograd.grad(loss(results, 0), own)):
        assert result.transpose(1, 2).is_contiguous()


def test_rows_further_apart_than_32_bits_count(device):
    # Only the rows themselves are ever touched, of memory that is never all there.
    apart = 2**30 + 8
    memory = torch.empty(4 * apart + 4, dtype=torch.float16, device=device)
    rows = memory.as_strided((5, 4), (apart, 1))
    rows.copy_(torch.randn(5, 4))
    near_rows = rows.contiguous()
    for shape in ((1, 1, 5, 4), (1, 5, 1, 4), (5, 1, 1, 4)):
        far = memory.as_strided(shape, (*(apart if size == 5 else 0 for size in shape[:3]), 1))
        near = near_rows.view(shape)
        grad = torch.randn(shape, device=device).half().transpose(1, 2)
        one, other = (gradients_of_both(t, grad) for t in (far, near))
        assert_same(one, other)


def gradients_of_both(rows, grad):
    """Results and gradients of the ops themselves, for which `rows` are queries, keys and values."""
    from tokred_kernels.ops import lookup_scatter as scatter_ops

    three = (rows, rows, rows)
    out, lse = ops._lookup_gather(*three, 0.5, "triton")
    scattered = scatter_ops._lookup_scatter(*three, lse, 0.5, "triton")
    gathered = ops._lookup_gather_backward(grad, lse, *three, out, lse, 0.5, "triton")
    return [out, lse, scattered, *gathered, *scatter_ops._lookup_scatter_backward(grad, *three, lse, 0.5, "triton")]


def test_weights_far_below_1_keep_their_digits_in_float16(device):
    call = drawn((1, 1, 2, 40, 16), torch.float16, device)
    values = call.values * 2**9
    lse = (call.q.float() @ call.k.float().transpose(-2, -1) / 4).logsumexp(-1) + 10
    weights = (call.q.double() @ call.k.double().transpose(-2, -1) / 4 - lse.double()[..., None]).exp()
    assert weights.max() < 2e-5, "the test must see weights of few digits"
    assert_close(tk.lookup_scatter(call.q, call.k, values, lse), weights.transpose(-2, -1) @ values.double())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_own_query_alone(small_splits, device, value):
    call = drawn(SPLIT, device=device)
    out, lse = tk.lookup_gather(*call[:3])
    call.q[1, 0, 3, 2] = value
    got = tk.lookup_gather(*call[:3])
    for one, other in zip(got, (out, lse), strict=True):
        assert one[1, 0, 3].isnan().all()
        one[1, 0, 3] = other[1, 0, 3]
        assert torch.equal(one, other)


def test_nan_in_one_split_is_in_all_of_its_head(small_splits, device):
    call = drawn(SPLIT, device=device)
    call.k[1, 0, 35, 2] = math.nan
    for result in fused(call):
        assert not result[0].isnan().any()
        assert not result[1, 1].isnan().any()
        assert result[1, 0].isnan().all()


@dtypes
def test_no_order_depends_on_timing(small_splits, device, dtype):
    call = drawn((1, 2, 5, 70, 16), dtype, device)
    assert_same(every_gradient(call), every_gradient(call))


def test_nothing_is_put_together_where_one_split_is_enough(device, monkeypatch):
    from tokred_kernels.backends.triton import lookup_gather, lookup_gradients

    combined = []
    for module in (lookup_gather, lookup_gradients):
        combine = module.combine
        monkeypatch.setattr(
            module, "combine", lambda *parts, combine=combine, **how: (combined.append(how), combine(*parts, **how))
        )
    every_gradient(drawn((1, 1, 3, 255, 8), device=device))
    assert combined == []
    every_gradient(drawn((1, 1, 3, 256, 8), device=device))
    assert combined == [{"softmax": True}, {"softmax": False}, {"softmax": False}]


@pytest.mark.parametrize("shape", [(0, 2, 3, 5, 8), (2, 0, 3, 5, 8), (1, 2, 3, 100, 0)])
def test_nothing_to_look_up(small_splits, device, shape):
    call = drawn(shape, device=device)
    results = every_gradient(call)
    assert [t.shape for t in results] == [call.q.shape, call.q.shape[:3], call.k.shape, *(t.shape for t in call)]
    assert all(t.isfinite().all() for t in results)
    if not shape[-1]:
        torch.testing.assert_close(results[1], torch.full_like(results[1], math.log(100)))


def test_heads_that_are_too_wide(device):
    q = torch.randn(1, 1, 3, 129, device=device)
    with pytest.raises(RuntimeError, match=r"lookup_gather: .*at most 128 channels a head, got 129"):
        tk.lookup_gather(q, q, q)
    with pytest.raises(RuntimeError, match=r"lookup_scatter: .*at most 128 channels a head, got 129"):
        tk.lookup_scatter(q, q, q, q[..., 0])
