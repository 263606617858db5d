# SPDX-License-Identifier: MIT
import itertools
import math
import subprocess
import sys

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
    accumulator,
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
def test_no_images_heads_or_channels(everywhere):
    for shape in ((0, 2, 5, 4), (2, 3, 5, 0), (2, 0, 5, 4)):
        for names, importance in itertools.product(TERMS.values(), (None, "class", "mean")):
            if importance and shape[1] == 0:
                continue  # the mean of nothing
            call, leaves = drawn(shape, torch.float32, names).map(lambda t: t.to(everywhere)).leaves()
            out, worth = call.run(importance=importance)
            assert out.shape == shape
            if importance:
                assert worth.shape == (shape[0], shape[2])
                torch.testing.assert_close(worth.sum(1), torch.ones_like(worth[:, :1]).sum(1), rtol=1e-5, atol=1e-5)
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

    def run(*tensors):
        given = dict(zip((name for name, t in zip(Call._fields, call, strict=True) if t is not None), tensors))
        return tuple(r for r in Call(**{**call._asdict(), **given}).run(importance=importance) if r is not None)

    with tk.use_backend(which):
        assert torch.autograd.gradcheck(run, leaves)


@KERNELS
def test_only_asked_gradients_are_made(backend):
    call = drawn((2, 2, 9, 8), torch.float32, ("size", "policy")).map(lambda t: t.to(backend))
    _, leaves = call.leaves()
    whole = torch.autograd.grad(Call(*leaves).run(importance="mean")[0].square().sum(), leaves)
    for number, name in enumerate(Call._fields):
        leaf = leaves[number].detach().requires_grad_()
        out, worth = call._replace(**{name: leaf}).run(importance="mean")
        assert worth.requires_grad == (name != "v") or worth.grad_fn is not None
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


@KERNELS
def test_two_runs_are_equal_bit_by_bit(backend):
    call, leaves = drawn((2, 3, 197, 64), torch.float32, ("size", "policy")).map(lambda t: t.to(backend)).leaves()
    runs = []
    for _ in range(2):
        out, worth = call.run(importance="mean")
        runs.append((out, worth, *torch.autograd.grad(out.sin().sum() + worth.sin().sum(), leaves)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@dtypes
def test_the_number_of_threads_changes_no_bit(dtype):
    call, leaves = drawn((3, 3, 65, 40), dtype, ("size", "policy")).leaves()
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out, worth = call.run(importance="mean")
            grads = torch.autograd.grad((out, worth), leaves, (torch.ones_like(out), torch.ones_like(worth)))
            runs.append((out, worth, *grads))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


@KERNELS
@terms
def test_an_image_is_the_same_beside_others(backend, terms):
    call = drawn((4, 2, 33, 16), torch.float32, terms).map(lambda t: t.to(backend))
    together = call.run(importance="mean")
    for image in range(4):
        alone = call.map(lambda t, image=image: t[image : image + 1]).run(importance="mean")
        for got, want in zip(together, alone, strict=True):
            assert torch.equal(got[image], want[0])


@KERNELS
@pytest.mark.parametrize("value", [math.nan, math.inf])
@terms
def test_what_is_not_finite_stays_where_it_reaches(backend, value, terms):
    call = drawn((2, 2, 20, 8), torch.float32, terms).map(lambda t: t.to(backend))
    clean, leaves = call.leaves()
    clean = clean.run(importance="mean")
    grads = torch.autograd.grad([r.square().sum() for r in clean], leaves)
    for name in ("q", "k", "v"):
        broken, leaves = call._replace(**{name: getattr(call, name).clone()}).leaves()
        with torch.no_grad():
            getattr(broken, name)[0, 0, 5, 2] = value
        out, worth = broken.run(importance="mean")
        lost = torch.zeros(2, 2, 20, 8, dtype=torch.bool)
        if name == "q":
            lost[0, 0, 5] = True
        elif name == "v":
            lost[0, 0, :, 2] = True
        else:
            lost[0, 0] = True  # an infinite score is NaN at its own place at the latest
        assert torch.equal(out[1], clean[0][1]) and torch.equal(out[0, 1], clean[0][0, 1])
        if math.isnan(value):
            assert torch.equal(out.isnan().cpu(), lost)
        else:
            assert torch.equal(out.isfinite().cpu() | lost, torch.ones_like(lost))
        assert torch.equal(worth[1], clean[1][1])
        assert worth[0].isnan().any() == (name != "v")
        after = torch.autograd.grad([out.square().sum(), worth.square().sum()], leaves)
        for got, want in zip(after, grads, strict=True):
            assert torch.equal(got[1], want[1])


@pytest.fixture
def counted(monkeypatch):
    """The arguments of each call of torch's own attention."""
    calls, torchs = [], F.scaled_dot_product_attention

    def count(*arguments, **keywords):
        calls.append(keywords)
        return torchs(*arguments, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    return calls


@pytest.mark.parametrize("which", ["auto", "cpu"])
@dtypes
def test_plain_attention_is_torchs(counted, which, dtype):
    call = drawn((2, 3, 33, 16), dtype)
    with tk.use_backend(which):
        out, own = tk.token_attention(*call[:3]), tk.token_attention(*call[:3], scale=0.3)
    assert [keywords["attn_mask"] for keywords in counted] == [None, None]
    assert torch.equal(out, F.scaled_dot_product_attention(*call[:3]))
    assert torch.equal(own, F.scaled_dot_product_attention(*call[:3], scale=0.3))


@pytest.mark.gpu
def test_plain_attention_is_torchs_on_a_gpu(counted):
    q, k, v = (t.cuda().bfloat16() for t in drawn((2, 3, 33, 16), torch.float32)[:3])
    assert torch.equal(tk.token_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert len(counted) == 2


@pytest.mark.parametrize("which", ["auto", "cpu"])
@dtypes
def test_sizes_alone_are_torchs_bias(counted, which, dtype):
    call = drawn((2, 3, 33, 16), dtype, ("size",))
    mask = call.size.to(accumulator(dtype)).log()[:, None, None, :].to(dtype)
    with tk.use_backend(which):
        out = call.run()[0]
    assert len(counted) == 1
    assert torch.equal(counted[0]["attn_mask"], mask)
    assert torch.equal(out, F.scaled_dot_product_attention(*call[:3], attn_mask=mask))


def test_torchs_attention_is_not_asked_for_what_it_lacks(counted):
    for names in TERMS.values():
        call = drawn((2, 3, 9, 16), torch.float32, names)
        call.run(importance="class")
        if call.policy is not None:
            call.run()
    sized = drawn((2, 3, 9, 16), torch.float32, ("size",))
    learned = sized._replace(size=sized.size.requires_grad_())
    learned.run()
    with tk.use_backend("reference"):
        sized.run()
        drawn((2, 3, 9, 16), torch.float32).run()
    assert not counted
    with torch.no_grad():
        learned.run()
    assert len(counted) == 1


PEAK = """
import torch, tokred_kernels as tk
def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
def attend(tokens):
    q, k, v = (torch.randn(1, 4, tokens, 16, requires_grad=True) for _ in range(3))
    policy = torch.rand(1, tokens, requires_grad=True)
    with tk.use_backend("{which}"):
        out, worth = tk.token_attention(q, k, v, size=policy + 0.5, policy=policy, importance="mean")
        (out.sum() + worth.square().sum()).backward()
attend(64)
before = peak()
attend(3000)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory where Linux says it")
def test_the_weights_are_never_stored():
    weights = 4 * 3000 * 3000 * 4 // 1024  # those of all heads, in KiB
    used = {
        which: int(subprocess.run([sys.executable, "-c", PEAK.format(which=which)], capture_output=True, check=True).stdout)
        for which in ("cpu", "reference")
    }
    assert used["cpu"] < weights / 10, used
    assert used["reference"] > weights, "this says nothing"


Q = (2, 3, 9, 4)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda q: tk.token_attention(q.tolist(), q, q), TypeError, "q must be a torch.Tensor, got list"),
        (lambda q: tk.token_attention(q.int(), q, q), TypeError, "q must be float32.*got torch.int32"),
        (lambda q: tk.token_attention(q, q, q.to_sparse()), TypeError, "v must be a dense"),
        (lambda q: tk.token_attention(q[0], q, q), ValueError, r"q must be \(B, H, N, d\), got shape \(3, 9, 4\)"),
        (
            lambda q: tk.token_attention(q, q[:, :, :5], q),
            ValueError,
            r"k must have q's shape \(2, 3, 9, 4\), got \(2, 3, 5, 4\)",
        ),
        (lambda q: tk.token_attention(q, q, q[..., :2]), ValueError, r"v must have q's shape .*got \(2, 3, 9, 2\)"),
        (lambda q: tk.token_attention(q, q.half(), q), TypeError, "k must have q's dtype torch.float32, got .*float16"),
        (lambda q: tk.token_attention(q, q, q.double()), TypeError, "v must have q's dtype .*got torch.float64"),
        (lambda q: tk.token_attention(q, q.to("meta"), q), ValueError, "k is on meta but q is on cpu"),
        (
            lambda q: tk.token_attention(q, q, q, size=torch.ones(2, 8)),
            ValueError,
            r"size must be \(2, 9\) or \(2, 9, 1\), got \(2, 8\)",
        ),
        (
            lambda q: tk.token_attention(q, q, q, policy=torch.ones(2, 9, 2)),
            ValueError,
            r"policy must be \(2, 9\) or \(2, 9, 1\), got \(2, 9, 2\)",
        ),
        (lambda q: tk.token_attention(q, q, q, size=2), TypeError, "size must be a torch.Tensor, got int"),
        (lambda q: tk.token_attention(q, q, q, policy=torch.ones(2, 9).bool()), TypeError, "policy must be .*bool"),
        (
            lambda q: tk.token_attention(q, q, q, size=torch.ones(2, 9).to("meta")),
            ValueError,
            "size is on meta but q is on cpu",
        ),
        (
            lambda q: tk.token_attention(q, q, q, size=torch.arange(18.0).view(2, 9)),
            ValueError,
            "size must be above 0, got 0",
        ),
        (
            lambda q: tk.token_attention(q, q, q, size=torch.full((2, 9), -1.5)),
            ValueError,
            r"size must be above 0, got -1\.5",
        ),
        (
            lambda q: tk.token_attention(q, q, q, policy=torch.linspace(-0.5, 1, 18).view(2, 9)),
            ValueError,
            r"policy must be from 0 to 1, got values from -0\.5 to 1",
        ),
        (
            lambda q: tk.token_attention(q, q, q, policy=torch.linspace(0, 2, 18).view(2, 9)),
            ValueError,
            "policy must be from 0 to 1, got values from 0 to 2",
        ),
        (
            lambda q: tk.token_attention(q, q, q, importance="cls"),
            ValueError,
            "importance must be None or one of 'class', 'mean', 'last', got 'cls'",
        ),
        (lambda q: tk.token_attention(q, q, q, importance=True), ValueError, "importance must be .*got True"),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=rf"^tokred_kernels\.token_attention: .*{words}"):
        call(torch.randn(Q))


def test_a_backend_that_cannot_serve_raises():
    call = drawn((1, 2, 9, 4), torch.float32, ("policy",))
    with (
        tk.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r'token_attention: backend "cuda" was asked for .*no cuda kernel.*: .*cpu'),
    ):
        call.run()
