# SPDX-License-Identifier: MIT
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from dense_attention import (
    ALL_DTYPES,
    EPS,
    IMPORTANCES,
    TERMS,
    Call,
    check,
    drawn,
)
from support import golden, on_reference, slow

import tokred_kernels as tk
from tokred_kernels import backends

OP = "token_attention"


terms = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
dtypes = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)


# Without a policy, an importance or a gradient of sizes, torch's attention runs; another test covers it.
@dtypes
@pytest.mark.parametrize(
    "tokens,channels",
    [
        *((1, 5), (2, 40), (3, 64), (17, 128), (33, 32), (65, 1)),
        *slow((17, 1), (65, 40), (65, 128), (197, 5), (197, 32), (197, 64), (197, 128)),
    ],
)
def test_equals_float64(device, tokens, channels, dtype):
    for number, names in enumerate(TERMS.values()):
        importance = IMPORTANCES[(number + tokens + channels) % 3]
        check(drawn((2, 2, tokens, channels), dtype, names), device, importance)


@terms
@pytest.mark.parametrize("importance", [None, *IMPORTANCES])
@pytest.mark.parametrize("scale", [None, *slow(0.3)])
def test_every_importance_with_every_term(device, terms, importance, scale):
    for heads in (1, 3):
        check(drawn((2, heads, 33, 16), torch.float32, terms), device, importance, scale)


@terms
def test_scores_of_large_spread(device, terms):
    # Most weights are near 0, and under a policy so are the sums that they are divided by.
    check(drawn((2, 2, 50, 32), torch.float32, terms, spread=6.0), device, "mean")


@pytest.mark.slow
@dtypes
def test_many_images_and_heads(device, dtype):
    check(drawn((9, 7, 20, 8), dtype, ("size", "policy")), device, "class")


@pytest.mark.slow
def test_many_tokens(device):
    for names in TERMS.values():
        check(drawn((1, 1, 1500, 64), torch.float32, names), device, "mean")


LAYOUTS = {
    "heads next to channels": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "of q, k, v in one": lambda t: torch.stack([t, t, t], 3).permute(3, 0, 1, 2, 4)[1],
    "channels apart": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "images inside": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "sliced": lambda t: F.pad(t, (3, 5, 1, 2))[:, :, 1:-2, 3:-5],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_reads_strided_tokens(device, layout):
    for shape in ((2, 3, 19, 12), (2, 1, 4, 1)):
        for names in ((), ("size", "policy")):
            check(drawn(shape, torch.float32, names), device, "mean", move=layout)


def test_reads_one_token_for_many(device):
    q, k = torch.randn(1, 1, 1, 8, device=device), torch.randn(3, 2, 9, 8, device=device)
    for sizes in ((3, 2, 9, 8), (3, 2, 1, 8)):
        row = q.expand(sizes)
        keys = k[:, :, : sizes[2]]
        got, want = (tk.token_attention(x, keys, x, importance="mean") for x in (row, row.contiguous()))
        torch.testing.assert_close(got, want)
    many = torch.randn(1, 2, 9, 8, device=device).expand(3, -1, -1, -1)  # of the same image
    got, want = (tk.token_attention(x, k, x, importance="mean") for x in (many, many.contiguous()))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("channels", [1, 8])
def test_expanded_gradients(device, channels):
    call, leaves = drawn((3, 2, 9, channels), torch.float32, ("policy",)).map(lambda t: t.to(device)).leaves()
    out, worth = call.run(importance="mean")
    expanded = torch.autograd.grad(out.sum() + worth.sum(), leaves, retain_graph=True)
    written = torch.autograd.grad((out, worth), leaves, (torch.ones_like(out), torch.ones_like(worth)))
    for got, want in zip(expanded, written, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@terms
def test_size_and_policy_may_carry_a_last_dimension_and_other_floats(device, terms):
    call = drawn((2, 2, 9, 8), torch.float32, terms).map(lambda t: t.to(device))
    expected = call.run(importance="class")
    for change in (lambda t: t[..., None], lambda t: t.double(), lambda t: torch.stack([t, t], 2)[:, :, 1]):
        changed = call._replace(**{name: change(getattr(call, name)) for name in terms})
        for got, want in zip(changed.run(importance="class"), expected, strict=True):
            assert torch.equal(got, want)


def test_no_images_heads_tokens_or_channels(device):
    for shape in ((0, 2, 5, 4), (2, 3, 5, 0), (2, 0, 5, 4), (2, 3, 0, 4)):
        for names, importance in itertools.product(TERMS.values(), (None, "class", "mean", "last")):
            if importance and shape[1] == 0:
                continue  # the mean of nothing
            call, leaves = drawn(shape, torch.float32, names).map(lambda t: t.to(device)).leaves()
            out, worth = call.run(importance=importance)
            assert out.shape == shape
            if importance:
                assert worth.shape == (shape[0], shape[2])
                whole = worth.new_full(shape[:1], float(shape[2] > 0))
                torch.testing.assert_close(worth.sum(1), whole, rtol=1e-5, atol=1e-5)
            loss = out.sum() if worth is None else out.sum() + worth.square().sum()
            for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                assert grad.shape == leaf.shape
                assert torch.isfinite(grad).all()


def weigh_scores(scores, policy, **how):
    """The weights that the op makes of given scores (B, H, N, N): queries that are the scores, keys of one each."""
    one = torch.eye(scores.shape[-1], dtype=scores.dtype, device=scores.device).expand_as(scores)
    return tk.token_attention(scores, one, one, policy=policy, scale=1.0, **how)


def test_reproduces_the_published_dynamicvit(device):
    arrays, _ = golden("dynamicvit_policy_0.npz")
    scores, policy = (arrays[name].to(device).requires_grad_() for name in ("scores", "policy"))
    weights = weigh_scores(scores, policy)
    torch.testing.assert_close(weights.cpu(), arrays["out"], rtol=1e-5, atol=1e-7)
    grads = torch.autograd.grad(weights, (scores, policy), arrays["w"].to(device))
    for got, name in zip(grads, ("grad_scores", "grad_policy"), strict=True):
        torch.testing.assert_close(got.cpu(), arrays[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_a_policy_that_drops_all_leaves_the_diagonal(device, spread):
    scores = torch.randn(2, 2, 15, 15) * spread
    weights, worth = weigh_scores(scores.to(device), torch.zeros(2, 15, device=device), importance="mean")
    e = (scores.double() - scores.double().amax(-1, keepdim=True)).exp().diagonal(dim1=-2, dim2=-1)
    exact = (torch.diag_embed(e) + EPS / 15) / (e + EPS)[..., None]
    torch.testing.assert_close(weights.cpu().double(), exact, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(worth.cpu().double(), exact.mean((1, 2)), rtol=2e-5, atol=1e-9)
    check(drawn((2, 2, 15, 8), torch.float32, spread=spread)._replace(policy=torch.zeros(2, 15)), device, "mean")


def test_a_policy_that_keeps_all_changes_nothing(device):
    call = drawn((2, 3, 33, 16), torch.float32, ("size",)).map(lambda t: t.to(device))
    kept = call._replace(policy=torch.ones(2, 33, device=device))
    for got, want in zip(kept.run(importance="class"), call.run(importance="class"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


def test_a_token_of_size_two_is_two_tokens(device):
    call = drawn((2, 2, 9, 8), torch.float32).map(lambda t: t.to(device))
    size = torch.ones(2, 9, 1, device=device)
    size[:, 4] = 2
    twice = call.map(lambda t: torch.cat([t, t[:, :, 4:5]], 2)).run(importance="class")
    once = call._replace(size=size).run(importance="class")
    torch.testing.assert_close(once[0], twice[0][:, :, :9], rtol=1e-5, atol=1e-6)
    twice[1][:, 4] += twice[1][:, 9]
    torch.testing.assert_close(once[1], twice[1][:, :9], rtol=1e-5, atol=1e-6)


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize("importance", [None, *IMPORTANCES])
@terms
def test_gradcheck(device, terms, importance):
    call = drawn((2, 2, 6, 3), torch.float64, terms)
    if call.size is not None:
        call = call._replace(size=torch.rand(2, 6, dtype=torch.float64) * 3 + 0.5)
    if call.policy is not None:  # from the bounds, which a finite difference may not leave
        call = call._replace(policy=torch.rand(2, 6, dtype=torch.float64) * 0.98 + 0.01)
    _, leaves = call.leaves()

    names = [name for name, t in zip(Call._fields, call, strict=True) if t is not None]

    def run(*tensors):
        results = call._replace(**dict(zip(names, tensors, strict=True))).run(importance=importance)
        return tuple(r for r in results if r is not None)

    assert torch.autograd.gradcheck(run, leaves)


def test_only_required_gradients_are_computed(device):
    call = drawn((2, 2, 9, 8), torch.float32, ("size", "policy")).map(lambda t: t.to(device))
    _, leaves = call.leaves()
    whole = torch.autograd.grad(Call(*leaves).run(importance="mean")[0].square().sum(), leaves)
    for number, name in enumerate(Call._fields):
        leaf = leaves[number].detach().requires_grad_()
        out, _ = call._replace(**{name: leaf}).run(importance="mean")
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        assert torch.equal(grad, whole[number]), name


@pytest.mark.backends("cpu", "cuda", "triton")
def test_gradients_through_the_importance_alone(device):
    call, leaves = drawn((2, 2, 9, 8), torch.float32, ("policy",)).map(lambda t: t.to(device)).leaves()
    for importance in IMPORTANCES:
        got = torch.autograd.grad(call.run(importance=importance)[1].square().sum(), leaves)
        with tk.use_backend("reference"):
            loss = call.run(importance=importance)[1].square().sum()
            want = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
        assert (got[2] == 0).all()
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


@pytest.mark.backends("cpu", "cuda", "triton")
def test_second_derivatives_raise(device):
    for importance, loss in itertools.product((None, "mean"), (torch.sum, lambda t: t.square().sum())):
        call, leaves = drawn((1, 1, 4, 4), torch.float32, ("policy",)).map(lambda t: t.to(device)).leaves()
        result = call.run(importance=importance)[int(importance is not None)]
        grads = torch.autograd.grad(loss(result * result.detach()), leaves, create_graph=True)
        for leaf, grad in zip(leaves, grads, strict=True):
            with pytest.raises(RuntimeError, match="token_attention: second derivatives are not supported"):
                # With a term that has a derivative, so that only our error can stop it.
                (grad.square().sum() + leaf.square().sum()).backward(retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("above", [8.0, 14.0, 200.0])
def test_kept_keys_far_below_one_that_is_dropped(device, dtype, above):
    # Their weights are as small as eps, or 0, and so is the sum that they are divided by.
    call = drawn((1, 1, 40, 16), dtype, ("policy",))
    call.q[..., 0], call.k[..., 0], call.k[0, 0, 7, 0] = 4.0, 0.0, above
    call.policy[0, 7] = 0
    check(call, device, "mean")


def test_the_highest_score_has_a_gradient_if_eps_counts(device):
    # All keys but the query's own are dropped, and that one is far below the highest: half of each weight is eps's.
    call = drawn((1, 1, 24, 8), torch.float32, ("policy",), spread=0.1)
    call.q[..., 0], call.k[..., 0], call.k[0, 0, 11, 0] = 4.0, 0.0, 10.0
    check(call._replace(policy=torch.zeros(1, 24)), device, "mean")


def test_sizes_stay_float32_with_bfloat16_tokens(device):
    # bfloat16 has steps of 1/32 here: the logarithms of 577 and 578 would round apart by 3 %.
    q, k = torch.randn(2, 1, 2, 40, 32).to(device, torch.bfloat16)
    v = torch.ones_like(q)
    v[..., 1::2, :] = -1.0
    size = torch.full((1, 40), 577.0, device=device)
    size[:, 1::2] = 578.0
    got = tk.token_attention(q, k, v, size=size, importance="mean")
    wide = [t.double() for t in (q, k, v)]
    exact, rounded = (
        on_reference(tk.token_attention, *wide, size=sizes, importance="mean")
        for sizes in (size.double(), size.log().bfloat16().double().exp())
    )
    for one, right, wrong in zip(got, exact, rounded, strict=True):
        assert (one - right).abs().max() < (wrong - right).abs().max() / 3


@pytest.mark.backends("cpu", "triton")
def test_keys_of_no_weight_come_first(backend, device):
    # A size of 0 gives a score of -infinity, here in whole blocks before all others.
    q, k, v = torch.randn(3, 2, 1, 150, 8, device=device)
    bias = torch.zeros(2, 150, device=device)
    bias[:, :140] = -math.inf
    out, row_max, row_sum, worth = backends.implementation(backend, "token_attention")(
        q, k, v, bias, None, None, 0, 0.3, "mean"
    )
    weights = (q.double() @ k.double()[:, :, 140:].transpose(2, 3)).mul(0.3).softmax(-1)
    torch.testing.assert_close(out.transpose(1, 2).double(), weights @ v[:, :, 140:].double(), rtol=1e-5, atol=1e-5)
    assert (worth[:, :140] == 0).all()
    assert row_max.isfinite().all()
    assert (row_sum >= 1).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_query_that_is_not_finite_affects_no_other(device, value):
    for names in (("size",), ("policy",)):
        call = drawn((1, 2, 70, 8), torch.float32, names).map(lambda t: t.to(device))
        expected, _ = call.run(importance="mean")
        call.q[0, 1, 66, 3] = value
        got, _ = call.run(importance="mean")
        assert got[0, 1, 66].isnan().all()
        got[0, 1, 66] = expected[0, 1, 66]
        assert torch.equal(got, expected)


@pytest.mark.backends("triton")
@pytest.mark.parametrize("names", [("size",), ("policy",)], ids=str)
def test_the_rows_saved_are_those_of_the_cpu(device, names):
    # A graph may run forward on one backend and backward on another.
    call = drawn((2, 2, 19, 12), torch.float32, names)
    bias = None if call.size is None else call.size.log()
    grads = torch.randn(2, 19, 2, 12), torch.randn(2, 19)
    flags = 0, 0.25, "mean", call.size is not None, call.policy is not None

    def on(backend, op, place, *arguments):
        moved = [a.to(place) if isinstance(a, torch.Tensor) else a for a in arguments]
        return [t.cpu() for t in backends.implementation(backend, op)(*moved)]

    inputs = *call[:3], bias, call.policy, None
    saved = {
        name: on(name, "token_attention", place, *inputs, *flags[:3])
        for name, place in (("triton", device), ("cpu", "cpu"))
    }
    for one, other in zip(saved["triton"], saved["cpu"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    results = [
        on(name, "token_attention_backward", place, *grads, *inputs, *saved[other][:3], *flags)
        for name, place, other in (("triton", device, "cpu"), ("cpu", "cpu", "triton"))
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_two_runs_are_equal_bit_by_bit(device):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        call, leaves = drawn((1, 2, 70, 32), torch.bfloat16, ("size", "policy")).map(lambda t: t.to(device)).leaves()
        results = call.run(importance="mean")
        runs.append((*results, *torch.autograd.grad(sum(r.float().sin().sum() for r in results), leaves)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.backends("cpu", "triton")
def test_rows_further_apart_than_32_bits_count(device, far_rows):
    far_rows.copy_(torch.randn(5, 4))
    for shape in ((1, 1, 5, 4), (1, 5, 1, 4), (5, 1, 1, 4)):
        strides = [far_rows.stride(0) if size == 5 else 0 for size in shape[:3]]
        far, near = far_rows.as_strided(shape, (*strides, 1)), far_rows.contiguous().view(shape)
        got, same = (tk.token_attention(t, t, t, importance="mean") for t in (far, near))
        assert all(torch.equal(one, other) for one, other in zip(got, same, strict=True))


@pytest.mark.backends("triton")
def test_heads_that_are_too_wide(device):
    q = torch.randn(1, 1, 3, 129, device=device)
    with pytest.raises(RuntimeError, match=r"token_attention: .*at most 128 channels a head, got 129"):
        tk.token_attention(q, q, q, importance="mean")
