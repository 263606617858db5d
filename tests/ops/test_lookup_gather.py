# SPDX-License-Identifier: MIT
import pytest
import torch
import torch.nn.functional as F
from dense_lookup import ALL_DTYPES, ANYWHERE, KERNELS, LARGE, SHAPES, assert_close, check, dense, drawn, fused, loss
from support import poison

import tokred_kernels as tk

dtypes = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)


def served(dtype, where):
    if dtype == torch.float64 and where == "cuda":
        pytest.skip("float64 is for the reference and the CPU")


@KERNELS
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64_with_all_gradients(backend, shape, dtype, monkeypatch):
    served(dtype, backend)
    poison(monkeypatch)
    check(drawn(shape, dtype, backend))


@KERNELS
def test_many_keys(backend):
    check(drawn(LARGE, device=backend))


@ANYWHERE
def test_a_scale_of_its_own(everywhere):
    check(drawn((2, 2, 5, 33, 16), device=everywhere), scale=0.7)


@ANYWHERE
def test_scores_of_large_spread(everywhere):
    check(drawn((1, 2, 5, 300, 32), device=everywhere, spread=20.0))


LAYOUTS = {
    "heads beside channels": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "channels apart": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "images inside": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "sliced": lambda t: F.pad(t, (3, 5, 1, 2))[:, :, 1:-2, 3:-5],
}


@KERNELS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend, layout):
    call = drawn((2, 3, 7, 40, 16), device=backend)
    strided = type(call)(*map(LAYOUTS[layout], call))
    for got, want in zip(fused(strided), fused(call), strict=True):
        assert torch.equal(got, want)
    check(strided)


@KERNELS
def test_expanded_tensors(backend):
    call = drawn((1, 2, 4, 20, 8), device=backend)
    check(type(call)(*(t.expand(3, -1, -1, -1) for t in call)))


def test_bitwise_the_same_on_any_number_of_threads():
    call = drawn((1, 2, 20, 9000, 32))
    threads, results = torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        own = call.leaves()
        out = fused(own)
        results.append((*out, *torch.autograd.grad(loss(out, 0), own)))
    torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_gradcheck_of_gather_and_scatter_chained():
    call = drawn((1, 2, 3, 7, 4), torch.float64).leaves()
    assert torch.autograd.gradcheck(lambda *parts: fused(type(call)(*parts)), tuple(call))


def scattered_thrice(call):
    """What is gathered, and three scatters of its weights: the second of a copy of k, the third of the first result."""
    out, lse = tk.lookup_gather(call.q, call.k, call.v)
    first = tk.lookup_scatter(call.q, call.k, call.values, lse)
    second = tk.lookup_scatter(call.q, call.k.clone(), call.values, lse)
    third = tk.lookup_scatter(call.q, call.k, out, lse)
    return out, first, second, third


def test_a_gather_adds_to_the_gradients_of_every_scatter():
    own = drawn((2, 2, 5, 40, 16)).leaves()
    exact = own.exact()
    gathered, _, scattered = dense(exact)
    again = dense(exact._replace(values=gathered))[2]
    want = torch.autograd.grad(loss([gathered, scattered, scattered, again], 3), exact)
    results = scattered_thrice(own)
    for keep in (True, True, False):  # what one pass has written over is not what the next reads
        got = torch.autograd.grad(loss(results, 3), own, retain_graph=keep)
        for mine, right in zip(got, want, strict=True):
            assert_close(mine, right)


def test_a_scatter_alone_reaches_the_gather():
    own = drawn((2, 2, 5, 40, 16)).leaves()
    exact = own.exact()
    (want,) = torch.autograd.grad(loss([dense(exact)[2]], 3), exact.k)
    seen = []
    own.k.register_hook(seen.append)
    loss(fused(own)[2:], 3).backward()
    assert_close(own.k.grad, want)
    assert len(seen) == 1 and torch.equal(seen[0], own.k.grad)


def test_a_pass_for_values_alone_leaves_nothing_for_the_next():
    own = drawn((2, 2, 5, 40, 16)).leaves()
    exact = own.exact()
    (gathered, _, scattered), (right, _, spread) = fused(own), dense(exact)
    for result, want, of in ((scattered, spread, "values"), (gathered, right, "k"), (scattered, spread, "q")):
        (got,) = torch.autograd.grad(loss([result], 3), getattr(own, of), retain_graph=True)
        assert_close(got, torch.autograd.grad(loss([want], 3), getattr(exact, of), retain_graph=True)[0])


def test_a_scatter_of_another_scale_has_weights_of_its_own():
    own = drawn((2, 2, 5, 40, 16)).leaves()
    exact = own.exact()
    out, lse = tk.lookup_gather(own.q, own.k, own.v)
    other = tk.lookup_scatter(own.q, own.k, own.values, lse, scale=0.1)
    right, right_lse, _ = dense(exact)
    weights = (exact.q @ exact.k.transpose(-2, -1) * 0.1 - right_lse[..., None]).exp()
    want = torch.autograd.grad(loss([right, weights.transpose(-2, -1) @ exact.values], 3), exact)
    for mine, wanted in zip(torch.autograd.grad(loss([out, other], 3), own), want, strict=True):
        assert_close(mine, wanted)


def test_first_derivatives_that_keep_a_graph():
    own = drawn((1, 2, 3, 9, 8)).leaves()

    def squares():
        return sum(result.square().sum() for result in fused(own))

    plain = torch.autograd.grad(squares(), own)
    for got, want in zip(torch.autograd.grad(squares(), own, create_graph=True), plain, strict=True):
        torch.testing.assert_close(got, want)
        with pytest.raises(RuntimeError, match="second derivatives are not supported"):
            torch.autograd.grad(got.sum(), own, retain_graph=True, allow_unused=True)


def test_gradients_of_a_scatter_take_no_second_memory():
    call = drawn((1, 1, 2, 50_000, 32)).leaves()
    results = fused(call)
    ones = [torch.ones_like(result) for result in results]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        grads = torch.autograd.grad(results, call, ones)
    taken = held = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            taken = max(taken, held)
    assert taken < sum(g.nbytes for g in grads) + call.k.nbytes / 2


def test_gradients_one_at_a_time():
    for number in range(3):
        call = drawn((2, 1, 3, 9, 8))
        exact, parts = call.exact(), [t.detach() for t in call]
        parts[number].requires_grad_()
        out, _ = tk.lookup_gather(*parts[:3])
        (own,) = torch.autograd.grad(loss([out], 3), parts[number])
        (want,) = torch.autograd.grad(loss([dense(exact)[0]], 3), exact[number])
        assert_close(own, want)


def test_a_gradient_of_lse_alone():
    call = drawn((2, 1, 3, 9, 8))
    own, exact = call.leaves(), call.exact()
    _, lse = tk.lookup_gather(own.q, own.k, own.v)
    got = torch.autograd.grad(loss([lse], 3), own[:3])
    want = torch.autograd.grad(loss([dense(exact)[1]], 3), exact[:3], allow_unused=True)
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])
    assert not got[2].any()


def test_second_derivatives_are_refused():
    call = drawn((1, 1, 2, 5, 4)).leaves()
    out, _ = tk.lookup_gather(*call[:3])
    (gradient,) = torch.autograd.grad(out.square().sum(), call.q, create_graph=True)
    with pytest.raises(RuntimeError, match="lookup_gather: second derivatives are not supported"):
        gradient.sum().backward()


@KERNELS
def test_nan_stays_in_its_image(backend):
    call = drawn((3, 2, 4, 50, 16), device=backend)
    call.k[1, 0, 7, 3] = float("nan")
    for result in fused(call):
        assert not result[[0, 2]].isnan().any()
        assert result[1, 0].isnan().any()
        assert not result[1, 1].isnan().any()


def test_memory_does_not_grow_with_the_product():
    call = drawn((1, 1, 512, 8192, 16)).leaves()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        loss(fused(call), 0).backward()
    largest = max(abs(event.nbytes()) for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")
    assert largest < 512 * 8192 * 4 / 2  # what the weights of a head would take, halved


BAD = {
    "q of another rank": (lambda c: {"q": c.q[0]}, ValueError, r"q must be \(B, H, M, d\), got shape"),
    "k of other heads": (lambda c: {"k": c.k[:, :1]}, ValueError, r"k must be \(B, H, N, d\) as q is"),
    "v of fewer tokens": (lambda c: {"v": c.v[:, :, 1:]}, ValueError, r"v must be \(2, 2, 9, 8\), got \(2, 2, 8, 8\)"),
    "more compressed tokens than tokens": (
        lambda c: {"q": torch.randn(2, 2, 10, 8)},
        ValueError,
        "q must have from 1 to N = 9 tokens, as many as k has, got 10",
    ),
    "no compressed token": (lambda c: {"q": c.q[:, :, :0]}, ValueError, "q must have from 1 to N = 9 tokens"),
    "k of another dtype": (lambda c: {"k": c.k.double()}, TypeError, "k must have q's dtype torch.float32"),
    "scale a tensor": (lambda c: {"scale": torch.tensor(0.3)}, TypeError, "scale must be a number, got Tensor"),
    "q no tensor": (lambda c: {"q": [1.0]}, TypeError, "q must be"),
    "q of whole numbers": (lambda c: {"q": c.q.int()}, TypeError, "q must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told(name):
    call = drawn((2, 2, 3, 9, 8))
    change, error, words = BAD[name]
    with pytest.raises(error, match="tokred_kernels.lookup_gather: " + words):
        tk.lookup_gather(**{"q": call.q, "k": call.k, "v": call.v, **change(call)})
