# SPDX-License-Identifier: MIT
"""The attention of patched models: it equals `token_attention`, except for dropped weights."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tokred_kernels import Packing, token_attention
from tokred_kernels.nn.attention import attend, size_bias

# Batch, heads, tokens, channels of a head.
SHAPE = (2, 3, 7, 8)
LENGTHS = (4, 0, 1, 9)
TERMS = [(), ("size",), ("policy",), ("size", "policy")]
IMPORTANCES = (None, "class", "mean", "last")


def drawn(packed=False, dtype=torch.float64):
    """Return q, k, v, sizes and policy in one layout."""
    rows = (sum(LENGTHS),) if packed else (SHAPE[0], SHAPE[2])
    shape = (rows[0], SHAPE[1], SHAPE[3]) if packed else SHAPE
    tensors = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    return tensors, {"size": torch.rand(rows) + 0.5, "policy": torch.rand(rows).round()}


def weights_of(q, k, size=None, policy=None):
    """(B, H, N, N), by the definition."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if size is not None:
        scores = scores + size.to(q).log()[:, None, None, :]
    if policy is None:
        return scores.softmax(-1)
    own = torch.eye(q.shape[2], dtype=q.dtype)
    e = (scores - scores.amax(-1, keepdim=True)).exp() * (own + (1 - own) * policy.to(q)[:, None, None, :])
    return (e + 1e-6 / q.shape[2]) / (e.sum(-1, keepdim=True) + 1e-6)


def assert_same(found, expected, **how):
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, **how)


@pytest.mark.parametrize("column", [False, True], ids=["(B, N)", "(B, N, 1)"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("terms", TERMS, ids=" ".join)
def test_weights_written_out_are_those_of_token_attention(terms, importance, packed, column):
    qkv, more = drawn(packed)
    given = {name: more[name].unsqueeze(-1) if column else more[name] for name in terms}
    given |= {"importance": importance, "packed": Packing.of(LENGTHS, torch.device("cpu")) if packed else None}
    expected = token_attention(*qkv, **given)
    expected = expected if isinstance(expected, tuple) else (expected, None)
    assert_same(attend(*qkv, **given), expected, rtol=0, atol=0)
    assert_same(attend(*qkv, **given, fused=False), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "fused"])
def test_it_is_what_the_definition_says(fused):
    (q, k, v), more = drawn()
    weights = weights_of(q, k, **more)
    out, worth = attend(q, k, v, **more, importance="class", fused=fused)
    torch.testing.assert_close(out, weights @ v, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(worth, weights[:, :, 0].mean(1), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "fused"])
def test_gradients_are_those_of_the_definition(fused):
    (q, k, v), more = drawn()
    leaves = [t.double().requires_grad_() for t in (q, k, v, *more.values())]
    target, worth_target = torch.randn_like(q), torch.randn(SHAPE[0], SHAPE[2]).double()

    def gradients(out, worth):
        return torch.autograd.grad((out * target).sum() + (worth * worth_target).sum(), leaves)

    weights = weights_of(*leaves[:2], *leaves[3:])
    expected = gradients(weights @ leaves[2], weights.mean((1, 2)))
    found = gradients(*attend(*leaves[:3], size=leaves[3], policy=leaves[4], importance="mean", fused=fused))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "fused"])
@pytest.mark.parametrize("importance", [None, "class", "mean"])
@pytest.mark.parametrize("terms", TERMS, ids=" ".join)
def test_dropout_drops_weights_of_the_softmax_and_scales_the_rest(terms, importance, fused):
    """v is the identity, so the output is the weights."""
    (q, k, _), more = drawn()
    q, k = q[:, :, :, :7].contiguous(), k[:, :, :, :7].contiguous()
    v = torch.eye(7, dtype=q.dtype).expand(2, 3, 7, 7).contiguous()
    given = {name: more[name] for name in terms}
    weights = weights_of(q, k, **given)
    kept = 0
    for _ in range(20):
        out, worth = attend(q, k, v, **given, importance=importance, dropout=0.25, fused=fused)
        stays = out != 0
        torch.testing.assert_close(out[stays], (weights / 0.75)[stays], rtol=1e-6, atol=1e-9)
        kept += stays.sum().item()
        # Importance counts weights before they are dropped.
        expected = {None: None, "class": weights[:, :, 0].mean(1), "mean": weights.mean((1, 2))}[importance]
        assert_same([worth], [expected], rtol=1e-6, atol=1e-9)
    assert 0.72 < kept / (20 * weights.numel()) < 0.78


@pytest.mark.parametrize("column", [False, True], ids=["(B, N)", "(B, N, 1)"])
@pytest.mark.parametrize("terms", TERMS, ids=" ".join)
def test_dropout_of_packed_images_is_of_each_by_itself(terms, column):
    (q, k, v), more = drawn(packed=True)
    given = {name: more[name].unsqueeze(-1) if column else more[name] for name in terms}
    packed = Packing.of(LENGTHS, torch.device("cpu"))
    torch.manual_seed(1)
    out, worth = attend(q, k, v, **given, packed=packed, importance="class", dropout=0.5)
    torch.manual_seed(1)
    for first, last in itertools.pairwise([0, *itertools.accumulate(LENGTHS)]):
        if first == last:
            continue
        alone = [t[first:last].transpose(0, 1)[None] for t in (q, k, v)]
        own = {name: given[name][first:last][None] for name in terms}
        expected, own_worth = attend(*alone, **own, importance="class", dropout=0.5)
        torch.testing.assert_close(out[first:last], expected[0].transpose(0, 1), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(worth[first:last], own_worth[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("how", [{}, {"dropout": 0.5}, {"fused": False}], ids=["plain", "dropout", "written out"])
def test_no_image_at_all(how):
    q = torch.zeros(0, 3, 8)
    out, worth = attend(q, q, q, packed=Packing.of((), torch.device("cpu")), importance="mean", **how)
    assert (out.shape, worth.shape) == ((0, 3, 8), (0,))
    assert attend(q, q, q, packed=Packing.of((), torch.device("cpu")), **how)[1] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"fused": False}], ids=["fused", "written out"])
def test_half_precision_keeps_importance_in_float32(how, dtype):
    qkv, more = drawn(dtype=dtype)
    weights = weights_of(*(t.double() for t in qkv[:2]), **more)
    out, worth = attend(*qkv, **more, importance="class", **how)
    assert (out.dtype, worth.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(worth.double(), weights[:, :, 0].mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.double(), weights @ qkv[2].double(), rtol=0.02, atol=0.02)


def test_the_bias_of_sizes_stays_a_row():
    size = torch.tensor([[[1.0], [2.0], [4.0]]])
    bias = size_bias(size, torch.zeros(1, 2, 3, 8, dtype=torch.float64))
    assert bias.dtype == torch.float64
    torch.testing.assert_close(bias, size.double().log().view(1, 1, 1, 3), rtol=1e-6, atol=0)
    q = torch.randn(1, 2, 3, 8)
    torch.testing.assert_close(
        F.scaled_dot_product_attention(q, q, q, attn_mask=size_bias(size, q)), attend(q, q, q, size=size)[0]
    )
