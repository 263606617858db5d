# SPDX-License-Identifier: MIT
import itertools

import pytest
import torch
import torch.nn.functional as F
from dense_attention import (
    ALL_DTYPES,
    ANYWHERE,
    EPS,
    IMPORTANCES,
    KERNELS,
    TERMS,
    Call,
    check,
    drawn,
)
from support import golden, poison

import tokred_kernels as tk


def served(dtype, where):
    if dtype == torch.float64 and where == "cuda":
        pytest.skip("float64 is for the reference and the CPU")


terms = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
dtypes = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)


# Without a policy, an importance or a gradient of sizes torch's attention does the work: has a test of its own.
@KERNELS
@dtypes
@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 65, 197])
@pytest.mark.parametrize("channels", [1, 5, 32, 40, 64, 128])
def test_equals_float64(backend, tokens, channels, dtype, monkeypatch):
    served(dtype, backend)
    poison(monkeypatch)
    for number, names in enumerate(TERMS.values()):
        importance = IMPORTANCES[(number + tokens + channels) % 3]
        check(drawn((2, 2, tokens, channels), dtype, names), backend, importance)


@ANYWHERE
@terms
@pytest.mark.parametrize("importance", [None, *IMPORTANCES])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_importance_with_every_term(everywhere, terms, importance, scale):
    for heads in (1, 3):
        check(drawn((2, heads, 33, 16), torch.float32, terms), everywhere, importance, scale)


@ANYWHERE
@terms
def test_scores_of_large_spread(everywhere, terms):
    # Most weights are near 0, and under a policy so are the sums that they are divided by.
    check(drawn((2, 2, 50, 32), torch.float32, terms, spread=6.0), everywhere, "mean")


@ANYWHERE
@dtypes
def test_many_images_and_heads(everywhere, dtype):
    served(dtype, everywhere)
    check(drawn((9, 7, 20, 8), dtype, ("size", "policy")), everywhere, "class")


@KERNELS
def test_more_tokens_than_a_model_has(backend):
    for names in TERMS.values():
        check(drawn((1, 1, 1500, 64), torch.float32, names), backend, "mean")


LAYOUTS = {
    "heads beside channels": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "of q, k, v in one": lambda t: torch.stack([t, t, t], 3).permute(3, 0, 1, 2, 4)[1],
    "channels apart": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "images inside": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "sliced": lambda t: F.pad(t, (3, 5, 1, 2))[:, :, 1:-2, 3:-5],
}


@ANYWHERE
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@terms
def test_reads_strided_tokens(everywhere, layout, terms):
    for shape in ((2, 3, 19, 12), (2, 1, 4, 1)):
        check(drawn(shape, torch.float32, terms), everywhere, "mean", move=layout)


@ANYWHERE
def test_reads_one_token_for_many(everywhere):
    q, k = torch.randn(1, 1, 1, 8, device=everywhere), torch.randn(3, 2, 9, 8, device=everywhere)
    for sizes in ((3, 2, 9, 8), (3, 2, 1, 8)):
        row = q.expand(sizes)
        keys = k[:, :, : sizes[2]]
        got, want = (tk.token_attention(x, keys, x, importance="mean") for x in (row, row.contiguous()))
        torch.testing.assert_close(got, want)
    many = torch.randn(1, 2, 9, 8, device=everywhere).expand(3, -1, -1, -1)  # of the same image
    got, want = (tk.token_attention(x, k, x, importance="mean") for x in (many, many.contiguous()))
    torch.testing.assert_close(got, want)


@ANYWHERE
@pytest.mark.parametrize("channels", [1, 8])
def test_takes_gradients_that_are_one_number(everywhere, channels):
    call, leaves = drawn((3, 2, 9, channels), torch.float32, ("policy",)).map(lambda t: t.to(everywhere)).leaves()
    out, worth = call.run(importance="mean")
    expanded = torch.autograd.grad(out.sum() + worth.sum(), leaves, retain_graph=True)
    written = torch.autograd.grad((out, worth), leaves, (torch.ones_like(out), torch.ones_like(worth)))
    for got, want in zip(expanded, written, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@ANYWHERE
@terms
def test_size_and_policy_may_carry_a_last_dimension_and_other_floats(everywhere, terms):
    call = drawn((2, 2, 9, 8), torch.float32, terms).map(lambda t: t.to(everywhere))
    expected = call.run(importance="class")
    for change in (lambda t: t[..., None], lambda t: t.double(), lambda t: torch.stack([t, t], 2)[:, :, 1]):
        changed = call._replace(**{name: change(getattr(call, name)) for name in terms})
        for got, want in zip(changed.run(importance="class"), expected, strict=True):
            assert torch.equal(got, want)


@ANYWHERE
def test_no_images_heads_tokens_or_channels(everywhere):
    for shape in ((0, 2, 5, 4), (2, 3, 5, 0), (2, 0, 5, 4), (2, 3, 0, 4)):
        for names, importance in itertools.product(TERMS.values(), (None, "class", "mean", "last")):
            if importance and shape[1] == 0:
                continue  # the mean of nothing
            call, leaves = drawn(shape, torch.float32, names).map(lambda t: t.to(everywhere)).leaves()
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


@ANYWHERE
def test_reproduces_the_published_dynamicvit(everywhere):
    arrays, _ = golden("dynamicvit_policy_0.npz")
    scores, policy = (arrays[name].to(everywhere).requires_grad_() for name in ("scores", "policy"))
    weights = weigh_scores(scores, policy)
    torch.testing.assert_close(weights.cpu(), arrays["out"], rtol=1e-5, atol=1e-7)
    grads = torch.autograd.grad(weights, (scores, policy), arrays["w"].to(everywhere))
    for got, name in zip(grads, ("grad_scores", "grad_policy"), strict=True):
        torch.testing.assert_close(got.cpu(), arrays[name], rtol=1e-5, atol=2e-6)


@ANYWHERE
@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_a_policy_that_drops_all_leaves_the_diagonal(everywhere, spread):
    scores = torch.randn(2, 2, 15, 15) * spread
    weights, worth = weigh_scores(scores.to(everywhere), torch.zeros(2, 15, device=everywhere), importance="mean")
    e = (scores.double() - scores.double().amax(-1, keepdim=True)).exp().diagonal(dim1=-2, dim2=-1)
    exact = (torch.diag_embed(e) + EPS / 15) / (e + EPS)[..., None]
    torch.testing.assert_close(weights.cpu().double(), exact, rtol=2e-5, atol=1e-9)
    torch.testing.assert_close(worth.cpu().double(), exact.mean((1, 2)), rtol=2e-5, atol=1e-9)
    check(drawn((2, 2, 15, 8), torch.float32, spread=spread)._replace(policy=torch.zeros(2, 15)), everywhere, "mean")


@ANYWHERE
def test_a_policy_that_keeps_all_changes_nothing(everywhere):
    call = drawn((2, 3, 33, 16), torch.float32, ("size",)).map(lambda t: t.to(everywhere))
    kept = call._replace(policy=torch.ones(2, 33, device=everywhere))
    for got, want in zip(kept.run(importance="class"), call.run(importance="class"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@ANYWHERE
def test_a_token_of_size_two_is_two_tokens(everywhere):
    call = drawn((2, 2, 9, 8), torch.float32).map(lambda t: t.to(everywhere))
    size = torch.ones(2, 9, 1, device=everywhere)
    size[:, 4] = 2
    twice = call.map(lambda t: torch.cat([t, t[:, :, 4:5]], 2)).run(importance="class")
    once = call._replace(size=size).run(importance="class")
    torch.testing.assert_close(once[0], twice[0][:, :, :9], rtol=1e-5, atol=1e-6)
    twice[1][:, 4] += twice[1][:, 9]
    torch.testing.assert_close(once[1], twice[1][:, :9], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["cpu", "reference"])
@pytest.mark.parametrize("importance", [None, *IMPORTANCES])
@terms
def test_gradcheck(which, terms, importance):
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

    with tk.use_backend(which):
        assert torch.autograd.gradcheck(run, leaves)


@KERNELS
def test_only_asked_gradients_are_made(backend):
    call = drawn((2, 2, 9, 8), torch.float32, ("size", "policy")).map(lambda t: t.to(backend))
    _, leaves = call.leaves()
    whole = torch.autograd.grad(Call(*leaves).run(importance="mean")[0].square().sum(), leaves)
    for number, name in enumerate(Call._fields):
        leaf = leaves[number].detach().requires_grad_()
        out, _ = call._replace(**{name: leaf}).run(importance="mean")
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
        assert torch.equal(grad, whole[number]), name


@KERNELS
def test_gradients_through_the_importance_alone(backend):
    call, leaves = drawn((2, 2, 9, 8), torch.float32, ("policy",)).map(lambda t: t.to(backend)).leaves()
    for importance in IMPORTANCES:
        got = torch.autograd.grad(call.run(importance=importance)[1].square().sum(), leaves)
        with tk.use_backend("reference"):
            loss = call.run(importance=importance)[1].square().sum()
            want = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True)
        assert (got[2] == 0).all()
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


@KERNELS
def test_second_derivatives_raise(backend):
    for importance, loss in itertools.product((None, "mean"), (torch.sum, lambda t: t.square().sum())):
        call, leaves = drawn((1, 1, 4, 4), torch.float32, ("policy",)).map(lambda t: t.to(backend)).leaves()
        result = call.run(importance=importance)[int(importance is not None)]
        grads = torch.autograd.grad(loss(result * result.detach()), leaves, create_graph=True)
        for leaf, grad in zip(leaves, grads, strict=True):
            with pytest.raises(RuntimeError, match="token_attention: second derivatives are not supported"):
                # Beside a term that has a derivative, so that nothing but the message can stop it.
                (grad.square().sum() + leaf.square().sum()).backward(retain_graph=True)
