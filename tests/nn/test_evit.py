# SPDX-License-Identifier: MIT
"""EViT's parts: which tokens stay and what they leave behind, and how many as training goes on."""

import math

import pytest
import torch
from support import golden

import tokred_kernels as tk
from tokred_kernels.nn import cosine_keep_rate, keep_attentive

BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])


def written_out(x, importance, k, prefix, fuse):
    """The tokens of one image (N, C) that are left, and the lists of those that each stands for."""
    order = sorted(range(prefix, len(x)), key=lambda n: (-importance[n].item(), n))
    groups = [[n] for n in (*range(prefix), *order[:k])]
    tokens = [x[n] for n in (*range(prefix), *order[:k])]
    if fuse and order[k:]:
        tokens.append(sum(importance[n] * x[n] for n in order[k:]))
        groups.append(order[k:])
    return torch.stack(tokens) if tokens else x[:0], groups


@BACKENDS
@pytest.mark.parametrize("fuse", [True, False])
def test_gives_what_the_published_code_gave(fuse, backend):
    recorded, settings = golden("evit_0.npz")
    x, importance = recorded["x"], torch.nn.functional.pad(recorded["cls_attn"], (1, 0), value=9.0)
    k = math.ceil(settings["keep_rate"] * (x.shape[1] - 1))
    with tk.use_backend(backend):
        out, token_map = keep_attentive(x, importance, k, fuse=fuse)
    expected = recorded["out" if fuse else "out_without_fuse"]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    slots = recorded["kept_index"].long() + 1
    kept = torch.arange(1, k + 1, dtype=torch.int32).expand(2, -1)
    assert torch.equal(token_map.dest.gather(1, slots), kept)
    assert token_map.num_out == expected.shape[1]
    gone = torch.ones_like(token_map.dest, dtype=torch.bool).scatter(1, slots, False)
    gone[:, 0] = False
    assert (token_map.dest[gone] == (k + 1 if fuse else -1)).all()


@BACKENDS
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("tokens", [3, 4, 9, 40])
def test_every_number_that_can_be_kept(tokens, prefix, fuse, backend):
    x, importance = torch.randn(2, tokens, 5).double(), torch.rand(2, tokens).double()
    free = tokens - prefix
    for k in {k for k in (0, 1, free - 1, free) if 0 <= k <= free}:
        with tk.use_backend(backend):
            out, token_map = keep_attentive(x, importance, k, num_prefix=prefix, fuse=fuse)
        for image in range(2):
            expected, groups = written_out(x[image], importance[image], k, prefix, fuse)
            torch.testing.assert_close(out[image], expected, rtol=1e-9, atol=1e-12)
            assert token_map.count[image].tolist() == [len(group) for group in groups]


@BACKENDS
def test_ties_go_to_the_lower_index(backend):
    x, importance = torch.randn(1, 9, 4), torch.full((1, 9), 0.25)
    with tk.use_backend(backend):
        out, token_map = keep_attentive(x, importance, 3)
    assert token_map.dest.tolist() == [[0, 1, 2, 3, 4, 4, 4, 4, 4]]
    torch.testing.assert_close(out[0, :4], x[0, :4], rtol=0, atol=0)
    torch.testing.assert_close(out[0, 4], x[0, 4:].sum(0) * 0.25)


@BACKENDS
@pytest.mark.parametrize("fuse", [True, False])
def test_gradients_come_by_way_of_tokens_and_importance(fuse, backend):
    x = torch.randn(2, 11, 5).double().requires_grad_()
    importance = torch.rand(2, 11).double().requires_grad_()
    with tk.use_backend(backend):
        out, _ = keep_attentive(x, importance, 4, num_prefix=2, fuse=fuse)
        target = torch.randn_like(out)
        found = torch.autograd.grad((out * target).sum(), [x, importance], materialize_grads=True)
    images = [written_out(x[i], importance[i], 4, 2, fuse)[0] for i in range(2)]
    expected = torch.autograd.grad(
        (torch.stack(images) * target).sum(), [x, importance], materialize_grads=True, allow_unused=True
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert (found[1] != 0).sum() == (10 if fuse else 0)  # the five of each image that are fused


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_take_weights_of_float32(dtype):
    x, importance = torch.randn(2, 50, 8).to(dtype), torch.rand(2, 50) / 50
    out, _ = keep_attentive(x, importance, 7)
    assert out.dtype == dtype
    expected = torch.stack([written_out(x[i].double(), importance[i].double(), 7, 1, True)[0] for i in range(2)])
    torch.testing.assert_close(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_an_empty_batch():
    out, token_map = keep_attentive(torch.zeros(0, 6, 3), torch.zeros(0, 6), 2)
    assert (out.shape, token_map.num_out) == ((0, 4, 3), 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 10}, ValueError, "k must be at most N - num_prefix = 10 - 1 = 9, got 10"),
        ({"k": 2.0}, TypeError, "k must be an int, got float"),
        ({"num_prefix": 11}, ValueError, "num_prefix must be at most N = 10, got 11"),
        ({"fuse": 1}, TypeError, "fuse must be True or False, got 1"),
        ({"importance": torch.rand(2, 10, 1)}, ValueError, r"importance must be \(2, 10\) as x is"),
        ({"importance": torch.ones(2, 10).int()}, TypeError, "importance must be"),
        ({"importance": torch.rand(2, 9)}, ValueError, "importance must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused(change, error, message):
    given = {"x": torch.randn(2, 10, 4), "importance": torch.rand(2, 10), "k": 3, **change}
    with pytest.raises(error, match=message):
        keep_attentive(**given)


# --- the schedule


def published_keep_rate(iters, epoch, warmup_epochs, total_epochs, iters_per_epoch, base, highest):
    """`adjust_keep_rate`, by its formula."""
    if epoch < warmup_epochs:
        return 1
    if epoch >= total_epochs:
        return base
    share = (iters - iters_per_epoch * warmup_epochs) / (iters_per_epoch * (total_epochs - warmup_epochs))
    return base + (highest - base) * (math.cos(share * math.pi) + 1) * 0.5


@pytest.mark.parametrize(("base", "highest"), [(0.7, 1.0), (0.5, 0.9), (0.6, 0.6)])
def test_the_rate_is_the_published_one(base, highest):
    per_epoch, warmup, total = 7, 3, 11
    for step in range(per_epoch * (total + 2)):
        expected = published_keep_rate(step, step // per_epoch, warmup, total, per_epoch, base, highest)
        how = {"warmup": per_epoch * warmup, "total": per_epoch * total, "base": base, "highest": highest}
        assert cosine_keep_rate(step, **how) == pytest.approx(expected, rel=1e-12), step


def test_the_rate_at_warmup_middle_and_end():
    how = {"warmup": 10, "total": 110, "base": 0.5}
    assert [cosine_keep_rate(step, **how) for step in (0, 9, 10)] == [1.0, 1.0, 1.0]
    assert cosine_keep_rate(60, **how) == pytest.approx(0.75)
    assert 0.5 < cosine_keep_rate(109, **how) < 0.501
    assert [cosine_keep_rate(step, **how) for step in (110, 1000)] == [0.5, 0.5]
    assert cosine_keep_rate(0, warmup=0, total=10, base=0.5, highest=0.8) == pytest.approx(0.8)


@pytest.mark.parametrize("warmup", [0, 3])
def test_without_steps_to_fall_in_the_rate_is_the_base_after_the_warmup(warmup):
    """The published fine-tuning has neither warm-up nor steps of falling."""
    for step in (0, 1, 2, 3, 4, 1000):
        expected = published_keep_rate(step, step, warmup, warmup, 1, 0.7, 1.0)
        assert cosine_keep_rate(step, warmup=warmup, total=warmup, base=0.7) == expected
    assert cosine_keep_rate(0, warmup=0, total=0, base=0.7) == 0.7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": 0.0}, "must be 0 < base <= highest <= 1, got 0.0 and 1.0"),
        ({"base": 0.9, "highest": 0.8}, "got 0.9 and 0.8"),
        ({"highest": 1.1}, "got 0.7 and 1.1"),
        ({"base": math.nan}, "base must be a number, got NaN"),
        ({"warmup": 11}, "warmup must be from 0 to total, got 11 and 10"),
        ({"warmup": -1}, "got -1 and 10"),
        ({"total": math.nan}, "total must be a number, got NaN"),
        ({"step": -1}, "step must be at least 0, got -1"),
        ({"step": math.nan}, "step must be a number, got NaN"),
    ],
    ids=str,
)
def test_rates_that_are_refused(change, message):
    with pytest.raises(ValueError, match=f"tokred_kernels.nn.cosine_keep_rate: .*{message}"):
        cosine_keep_rate(**{"step": 0, "warmup": 2, "total": 10, "base": 0.7, **change})
