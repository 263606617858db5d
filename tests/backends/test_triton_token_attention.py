# SPDX-License-Identifier: MIT
"""Token attention in Triton against the reference in float64; conftest.py says where it runs."""

import itertools
import math

import pytest
import torch
from support import DTYPES

import tokred_kernels as tk
from tokred_kernels.ops import token_attention as ops
from tokred_kernels.ops.token_attention import token_attention
from tokred_kernels.packing import Packing

IMPORTANCES = (None, "class", "mean", "last")
TERMS = list(itertools.product((False, True), repeat=2))  # size, policy
# An image without a token, one of one, a pair, and one of more than a block.
LENGTHS = (5, 0, 66, 2, 1)
# Roundings that may add up, in units of the dtype's: of weights, of the output, of the gradients of scores; in float32
# of sums of products as well, which tensor cores cut where others round.
ROUNDINGS = {torch.float32: 32, torch.float16: 8, torch.bfloat16: 8}


def some_of_all(number):
    """Each importance with one of the terms, another one for each `number` (mod 4)."""
    return zip(IMPORTANCES, TERMS[number % 4 :] + TERMS[: number % 4], strict=True)


def leaves(rows, heads, channels, dtype, device, *, sized, chosen, packed=False):
    """q, k, v, and the size and policy of each token, most of them dropped to some part, the first not."""
    shape = (*rows, heads, channels) if packed else (rows[0], heads, rows[1], channels)
    q, k, v = (torch.randn(shape).to(device, dtype) for _ in range(3))
    size = (torch.rand(rows) * 3 + 0.5).to(device) if sized else None
    policy = (torch.rand(rows) * (torch.rand(rows) < 0.7)).to(device) if chosen else None
    return q, k, v, size, policy


def double(tensors):
    return [None if t is None else t.detach().double().cpu() for t in tensors]


def run(backend, tensors, importance, packed=None, grads=None):
    """Output, importance and the gradient of each of `tensors` that is there, `grads` being those of the results."""
    tensors = [None if t is None else t.detach().requires_grad_(grads is not None) for t in tensors]
    q, k, v, size, policy = tensors
    with tk.use_backend(backend):
        results = token_attention(q, k, v, size=size, policy=policy, importance=importance, packed=packed)
        results = results if importance else (results,)
        if grads is None:
            return list(results)
        given = [g.to(r.device, r.dtype) for g, r in zip(grads, results, strict=False)]
        present = [t for t in tensors if t is not None]
        return [*results, *torch.autograd.grad(results, present, given)]


def assert_near(got, exact, dtype, floor=0.0, rounded=None):
    """Raise unless `got` is `exact` to within some roundings of its largest number, plus `floor`.

    It may also be off by as much as `rounded`, the exact results for scores that are off by roundings.
    """
    for number, (one, other, near) in enumerate(zip(got, exact, rounded or exact, strict=True)):
        assert one.shape == other.shape
        assert one.isfinite().all()
        if one.numel():
            band = ROUNDINGS[dtype] * torch.finfo(dtype).eps * (other.detach().abs().max() + floor)
            band += (near - other).detach().abs().max()
            off = (one.detach().double().cpu() - other.detach()).abs().max()
            assert off <= band, f"result {number} is off by {off:.3g}, of {band:.3g}"


@pytest.mark.parametrize("tokens, channels", [(1, 8), (2, 40), (3, 64), (17, 128), (33, 32), (65, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_importance(device, dtype, tokens, channels):
    for importance, (sized, chosen) in some_of_all(tokens):
        tensors = leaves((2, tokens), 2, channels, dtype, device, sized=sized, chosen=chosen)
        got = run("triton", tensors, importance)
        exact = run("reference", double(tensors), importance)
        assert got[0].dtype == dtype
        assert_near(got[:1], exact[:1], dtype)
        if importance:
            assert got[1].dtype == torch.float32
            assert_near(got[1:], exact[1:], torch.float32)


@pytest.mark.parametrize("tokens, channels", [(1, 8), (2, 64), (3, 8), (17, 128), (33, 40), (65, 32)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(device, dtype, tokens, channels):
    batch, heads = (1, 2) if tokens == 3 else (1, 1)
    every = itertools.product(IMPORTANCES, TERMS)
    for importance, (sized, chosen) in every if (tokens, dtype) == (3, torch.float32) else some_of_all(tokens):
        tensors = leaves((batch, tokens), heads, channels, dtype, device, sized=sized, chosen=chosen)
        grads = torch.randn(batch, heads, tokens, channels).to(dtype), torch.randn(batch, tokens) * 30
        got = run("triton", tensors, importance, grads=grads)
        exact = run("reference", double(tensors), importance, grads=double(grads))
        # With few tokens there is next to no gradient but by rounding: that of what cancels.
        assert_near(got, exact, dtype, floor=30.0 / tokens)


@pytest.mark.parametrize("importance", ["class", "mean"])
def test_blocks_of_other_sizes(device, importance, monkeypatch):
    from tokred_kernels.backends.triton import token_attention as forward
    from tokred_kernels.backends.triton import token_attention_backward as backward
    from tokred_kernels.backends.triton.configs_tables import AttentionConfig

    narrow, wide = AttentionConfig(16, 32, 16, 4, 1), AttentionConfig(32, 16, 16, 4, 1)
    for one, other in ((narrow, wide), (wide, narrow)):
        monkeypatch.setattr(forward, "attention_config", lambda *_, config=one: config)
        monkeypatch.setattr(forward, "importance_config", lambda *_, config=other: config)
        monkeypatch.setattr(backward, "row_terms_config", lambda *_, config=one: config)
        monkeypatch.setattr(backward, "queries_config", lambda *_, config=other: config)
        monkeypatch.setattr(backward, "keys_config", lambda *_, config=one: config)
        for sized, chosen in ((True, False), (True, True)):
            tensors = leaves((1, 37), 2, 9, torch.float32, device, sized=sized, chosen=chosen)
            grads = torch.randn(1, 2, 37, 9), torch.randn(1, 37) * 30
            got = run("triton", tensors, importance, grads=grads)
            assert_near(got, run("reference", double(tensors), importance, grads=double(grads)), torch.float32)


@pytest.mark.parametrize("importance", ["class", "mean"])
def test_blocks_of_another_architecture(device, importance, monkeypatch):
    from tokred_kernels.backends.triton import token_attention as forward
    from tokred_kernels.backends.triton import token_attention_backward as backward
    from tokred_kernels.backends.triton.configs_tables import PORTABLE

    for module in (forward, backward):
        monkeypatch.setattr(module, "architecture_of", lambda _: "sm_90" if device == "cpu" else PORTABLE)
    for channels, tokens in ((64, 130), (128, 3)):
        tensors = leaves((1, tokens), 2, channels, torch.float16, device, sized=True, chosen=False)
        grads = torch.randn(1, 2, tokens, channels).half(), torch.randn(1, tokens) * 30
        got = run("triton", tensors, importance, grads=grads)
        exact = run("reference", double(tensors), importance, grads=double(grads))
        assert_near(got, exact, torch.float16, floor=30.0 / tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_images_are_each_alone(device, dtype):
    packed = Packing.of(LENGTHS, device)
    for importance, (sized, chosen) in some_of_all(1):
        tensors = leaves((packed.rows,), 1, 24, dtype, device, sized=sized, chosen=chosen, packed=True)
        grads = torch.randn(packed.rows, 1, 24).to(dtype), torch.randn(packed.rows) * 30
        got = run("triton", tensors, importance, packed, grads)
        on_cpu = Packing.of(LENGTHS, torch.device("cpu"))
        exact = run("reference", double(tensors), importance, on_cpu, double(grads))
        assert_near(got, exact, dtype)


def test_reads_tokens_as_they_lie(device):
    of_qkv = torch.randn(2, 9, 3, 2, 8, device=device)
    views = {
        "one qkv": of_qkv.permute(2, 0, 3, 1, 4).unbind(0),
        "channels apart": torch.randn(3, 2, 2, 9, 16, device=device)[..., ::2].unbind(0),
        "one image": torch.randn(3, 1, 2, 9, 8, device=device).expand(3, 2, 2, 9, 8).unbind(0),
        "not aligned": torch.randn(3, 2, 2, 9, 11, device=device)[..., 3:].unbind(0),
    }
    policy = torch.rand(2, 9, device=device)
    grads = torch.randn(2, 2, 1, 8).expand(2, 2, 9, 8), torch.randn(2, 9)
    for name, (q, k, v) in views.items():
        got = run("triton", (q, k, v, None, policy), "mean", grads=grads)
        dense = [t.contiguous() for t in (q, k, v)]
        same = run("triton", (*dense, None, policy), "mean", grads=[g.contiguous() for g in grads])
        assert got[0].transpose(1, 2).is_contiguous(), "heads join without a copy"
        for one, other in zip(got, same, strict=True):
            assert torch.equal(one, other), name
    packed = Packing.of((8, 0, 10), device)
    q, k, v = of_qkv.flatten(0, 1).unbind(1)
    got = run("triton", (q, k, v, None, policy.flatten()), "class", packed)
    same = run("triton", (*(t.contiguous() for t in (q, k, v)), None, policy.flatten()), "class", packed)
    assert all(torch.equal(one, other) for one, other in zip(got, same, strict=True))


def test_rows_further_apart_than_32_bits_count(device):
    # Only the rows themselves are ever touched, of memory that is never all there.
    apart = 2**30 + 8
    memory = torch.empty(4 * apart + 4, dtype=torch.float16, device=device)
    rows = memory.as_strided((5, 4), (apart, 1))
    rows.copy_(torch.randn(5, 4))
    dense = rows.contiguous()
    for shape in ((1, 1, 5, 4), (1, 5, 1, 4), (5, 1, 1, 4)):
        strides = [apart if size == 5 else 0 for size in shape[:3]]
        far, near = memory.as_strided(shape, (*strides, 1)), dense.view(shape)
        got, same = (run("triton", (t, t, t, None, None), None) for t in (far, near))
        assert torch.equal(got[0], same[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_policy_that_drops_all_is_finite(device, dtype):
    tensors = leaves((2, 33), 2, 16, dtype, device, sized=True, chosen=True)
    tensors[4].zero_()
    grads = torch.randn(2, 2, 33, 16).to(dtype), torch.randn(2, 33)
    for importance in (None, "mean"):
        got = run("triton", tensors, importance, grads=grads)
        exact = run("reference", double(tensors), importance, grads=double(grads))
        assert_near(got, exact, dtype, floor=4.0)  # next to nothing, by sums that cancel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("above", [8.0, 14.0, 200.0])
def test_kept_keys_far_below_one_that_is_dropped(device, dtype, above):
    # Their weights are as small as eps, or 0, and so is the sum that they are divided by.
    q, k, v, _, policy = leaves((1, 40), 1, 16, dtype, device, sized=False, chosen=True)
    q[..., 0], k[..., 0], k[0, 0, 7, 0] = 4.0, 0.0, above
    policy[0, 7] = 0
    grads = (torch.randn(1, 1, 40, 16).to(dtype), torch.randn(1, 40))
    tensors = (q, k, v, None, policy)
    exact = run("reference", double(tensors), "mean", grads=double(grads))
    got = run("triton", tensors, "mean", grads=grads)
    assert_near(got[:2], exact[:2], dtype)
    # Those of scores are multiplied by q and k, so the gradients of q and k are rounded at their size.
    scores_off = 1 + 2 * torch.finfo(torch.float32).eps
    rounded = run("reference", double((q.double() * scores_off, *tensors[1:])), "mean", grads=double(grads))
    assert_near(got[2:], exact[2:], dtype, floor=20.0 + above, rounded=rounded[2:])


def test_the_highest_score_is_moved_where_eps_counts(device):
    # All keys but the query's own are dropped, and that one is far below the highest: half of each weight is eps's.
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 1, 24, 8, device=device) * 0.1 for _ in range(3))
    q[..., 0], k[..., 0], k[0, 0, 11, 0] = 4.0, 0.0, 10.0
    policy = torch.zeros(1, 24, device=device)
    tensors, grads = (q, k, v, None, policy), (torch.randn(1, 1, 24, 8), torch.randn(1, 24))
    got = run("triton", tensors, "mean", grads=grads)
    exact = run("reference", double(tensors), "mean", grads=double(grads))
    assert exact[3][0, 0, 11].abs().max() > 0.1, "the test must see that key's gradient"
    for one, other in zip(got, exact, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=1e-4, atol=1e-5)


def test_sizes_stay_float32_with_bfloat16_vectors(device):
    # bfloat16 has steps of 1/32 here: the logarithms of 577 and 578 would round apart by 3 %.
    q, k, v = (torch.randn(1, 2, 40, 32).to(device, torch.bfloat16) for _ in range(3))
    v[..., 0::2, :], v[..., 1::2, :] = 1.0, -1.0
    size = torch.full((1, 40), 577.0, device=device)
    size[:, 1::2] = 578.0
    grads = torch.ones(1, 2, 40, 32), torch.randn(1, 40)
    got = run("triton", (q, k, v, size, None), "mean", grads=grads)
    cut = size.log().bfloat16().double().exp()
    exact, rounded = (
        run("reference", double((q, k, v, sizes, None)), "mean", grads=double(grads)) for sizes in (size, cut)
    )
    names = ("output", "importance", "q", "k", "v", "size")
    for name, one, right, wrong in zip(names, got, exact, rounded, strict=True):
        off, by_rounding = ((t.detach().cpu().double() - right.detach()).abs().max() for t in (one, wrong))
        if name in ("output", "importance", "v"):
            assert off < by_rounding / 3, f"{name} is off by {off:.3g}, a rounded size by {by_rounding:.3g}"


def test_keys_of_no_weight_come_first(device):
    # A score of -infinity, which a size of 0 gives where nobody looks at it, in whole blocks before all others.
    q, k, v, _, _ = leaves((2, 150), 1, 8, torch.float32, device, sized=False, chosen=False)
    bias = torch.zeros(2, 150, device=device)
    bias[:, :140] = -math.inf
    out, row_max, row_sum, worth = ops._token_attention(q, k, v, bias, None, None, 0, 0.3, "mean", "triton")
    weights = (q[:, :, :, None] * k[:, :, None]).sum(-1)[..., 140:].double().mul(0.3).softmax(-1)
    assert_near([out.transpose(1, 2)], [(weights @ v[:, :, 140:].double()).cpu()], torch.float32)
    assert (worth[:, :140] == 0).all()
    assert row_max.isfinite().all()
    assert (row_sum >= 1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_own_query_alone(device, value):
    q, k, v, size, policy = leaves((1, 70), 2, 8, torch.float32, device, sized=True, chosen=True)
    for terms in ((size, None), (None, policy)):
        expected = run("triton", (q, k, v, *terms), None)[0]
        spoilt = q.clone()
        spoilt[0, 1, 66, 3] = value
        got = run("triton", (spoilt, k, v, *terms), None)[0]
        assert got[0, 1, 66].isnan().all()
        got[0, 1, 66] = expected[0, 1, 66]
        assert torch.equal(got, expected)


@pytest.mark.parametrize("sized, chosen", TERMS)
def test_what_a_row_saves_serves_every_backend(device, sized, chosen):
    """Statistics of one backend, gradients of the other."""
    q, k, v, size, policy = leaves((2, 19), 2, 12, torch.float32, device, sized=sized, chosen=chosen)
    inputs = [q, k, v, None if size is None else size.log(), policy, None]
    on_cpu = [None if t is None else t.cpu() for t in inputs]
    saved = ops._token_attention(*inputs, 0, 0.25, "mean", "triton")
    native = ops._token_attention(*on_cpu, 0, 0.25, "mean", "cpu")
    assert_near(saved, double(native), torch.float32)
    grads = torch.randn(2, 19, 2, 12, device=device), torch.randn(2, 19, device=device)

    def backward(backend, place, tensors, statistics):
        given = [g.to(place) for g in grads]
        rows = [s.to(place) for s in statistics[:3]]
        return ops._token_attention_backward(*given, *tensors, *rows, 0, 0.25, "mean", sized, chosen, backend)

    expected = double(backward("cpu", "cpu", on_cpu, native))
    assert_near(backward("triton", device, inputs, native), expected, torch.float32, floor=4.0)
    assert_near(backward("cpu", "cpu", on_cpu, saved), expected, torch.float32, floor=4.0)


def test_no_order_depends_on_timing(device):
    tensors = leaves((1, 70), 2, 32, torch.bfloat16, device, sized=True, chosen=True)
    grads = torch.randn(1, 2, 70, 32).to(torch.bfloat16), torch.randn(1, 70)
    first, second = (run("triton", tensors, "mean", grads=grads) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8), (2, 2, 5, 0)])
def test_nothing_to_attend(device, shape):
    tensors = (*(torch.randn(shape, device=device) for _ in range(3)), None, torch.ones(shape[0], shape[2]).to(device))
    grads = torch.randn(shape), torch.randn(shape[0], shape[2])
    got = run("triton", tensors, "mean", grads=grads)
    assert [t.shape for t in got] == [t.shape for t in (tensors[0], tensors[4], *tensors[:3], tensors[4])]
    assert all(t.isfinite().all() for t in got)


def test_no_rows_packed(device):
    packed = Packing.of((0, 0), device)
    tensors = (*(torch.randn(0, 2, 8, device=device) for _ in range(3)), None, None)
    assert [tuple(t.shape) for t in run("triton", tensors, "last", packed)] == [(0, 2, 8), (0,)]


def test_heads_that_are_too_wide(device):
    q = torch.randn(1, 1, 3, 129, device=device)
    with pytest.raises(RuntimeError, match=r"token_attention: .*at most 128 channels a head, got 129"):
        run("triton", (q, q, q, None, None), "mean")
