# SPDX-License-Identifier: MIT
import math

import pytest
import torch
import torch.nn.functional as F
from dense_lookup import ALL_DTYPES, LARGE, SHAPES, assert_close, check, dense, drawn, fused, loss

import tokred_kernels as tk
from tokred_kernels import backends

dtypes = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64_with_all_gradients(device, shape, dtype):
    check(drawn(shape, dtype, device))


@pytest.mark.slow
def test_many_keys(device):
    check(drawn(LARGE, device=device))


def test_a_given_scale(device):
    check(drawn((2, 2, 5, 33, 16), device=device), scale=0.7)


def test_scores_of_large_spread(device):
    check(drawn((1, 2, 5, 300, 32), device=device, spread=20.0))


LAYOUTS = {
    "heads next to channels": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "channels apart": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "images inside": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "sliced": lambda t: F.pad(t, (3, 5, 1, 2))[:, :, 1:-2, 3:-5],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(device, layout):
    call = drawn((2, 3, 7, 40, 16), device=device)
    strided = type(call)(*map(LAYOUTS[layout], call))
    for got, want in zip(fused(strided), fused(call), strict=True):
        assert torch.equal(got, want)
    check(strided)


def test_expanded_tensors(device):
    call = drawn((1, 2, 4, 20, 8), device=device)
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


def test_a_backward_for_values_alone_leaves_nothing_for_the_next():
    own = drawn((2, 2, 5, 40, 16)).leaves()
    exact = own.exact()
    (gathered, _, scattered), (right, _, spread) = fused(own), dense(exact)
    for result, want, of in ((scattered, spread, "values"), (gathered, right, "k"), (scattered, spread, "q")):
        (got,) = torch.autograd.grad(loss([result], 3), getattr(own, of), retain_graph=True)
        assert_close(got, torch.autograd.grad(loss([want], 3), getattr(exact, of), retain_graph=True)[0])


def test_a_scatter_with_another_scale_recomputes_the_weights():
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


def test_gradients_one_at_a_time(device):
    for number in range(3):
        call = drawn((2, 1, 3, 9, 8), device=device)
        exact, parts = call.exact(), [t.detach() for t in call]
        parts[number].requires_grad_()
        out, _ = tk.lookup_gather(*parts[:3])
        (own,) = torch.autograd.grad(loss([out], 3), parts[number])
        (want,) = torch.autograd.grad(loss([dense(exact)[0]], 3), exact[number])
        assert_close(own, want)


def test_a_gradient_of_lse_alone(device):
    call = drawn((2, 1, 3, 9, 8), device=device)
    own, exact = call.leaves(), call.exact()
    _, lse = tk.lookup_gather(own.q, own.k, own.v)
    got = torch.autograd.grad(loss([lse], 3), own[:3], allow_unused=True)
    want = torch.autograd.grad(loss([dense(exact)[1]], 3), exact[:3], allow_unused=True)
    assert_close(got[0], want[0])
    assert_close(got[1], want[1])
    assert got[2] is None or not got[2].any()


def test_second_derivatives_raise():
    call = drawn((1, 1, 2, 5, 4)).leaves()
    out, _ = tk.lookup_gather(*call[:3])
    (gradient,) = torch.autograd.grad(out.square().sum(), call.q, create_graph=True)
    with pytest.raises(RuntimeError, match="lookup_gather: second derivatives are not supported"):
        gradient.sum().backward()


def test_nan_stays_in_its_image(device):
    call = drawn((3, 2, 4, 50, 16), device=device)
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


def test_one_key_far_above_all_others(device):
    call = drawn((1, 1, 3, 160, 8), device=device)
    call.q[..., 0] = 4.0
    for token in (0, 100, 159):
        call.k[..., 0] = 0.0
        call.k[0, 0, token, 0] = 40.0
        # A score is off by at most 8 roundings, one a channel, and a weight by the same factor of its exponential.
        check(call, rounding=8 / 2 * torch.finfo(torch.float32).eps * dense(call)[1].abs().max())


def test_scores_so_low_that_padded_keys_would_count(device):
    # Padded keys are 0, so their weights overflow float32.
    call = drawn((1, 1, 3, 33, 8), device=device)
    call.q[..., 0], call.k[..., 0] = 20.0, -16.0
    assert dense(call)[1].max() < -90
    check(call)


@pytest.mark.backends("cpu", "cuda", "triton")
def test_heads_join_without_a_copy(device):
    own = drawn((2, 2, 5, 40, 16), device=device).leaves()
    results = fused(own)
    for result in (results[0], results[2], *torch.autograd.grad(loss(results, 0), own)):
        assert result.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_equal_bit_by_bit(device, dtype):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        own = drawn((1, 2, 5, 70, 16), dtype, device).leaves()
        results = fused(own)
        runs.append((*results, *torch.autograd.grad(loss(results, 2), own)))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_weights_far_below_1_keep_their_digits_in_float16(device):
    call = drawn((1, 1, 2, 40, 16), torch.float16, device)
    values = call.values * 2**9
    lse = (call.q.float() @ call.k.float().transpose(-2, -1) / 4).logsumexp(-1) + 10
    weights = (call.q.double() @ call.k.double().transpose(-2, -1) / 4 - lse.double()[..., None]).exp()
    assert weights.max() < 2e-5, "the test must see weights of few digits"
    assert_close(tk.lookup_scatter(call.q, call.k, values, lse), weights.transpose(-2, -1) @ values.double())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_query_that_is_not_finite_affects_no_other(device, value):
    call = drawn((2, 2, 5, 40, 16), device=device)
    expected = tk.lookup_gather(*call[:3])
    call.q[1, 0, 3, 2] = value
    for got, clean in zip(tk.lookup_gather(*call[:3]), expected, strict=True):
        assert not got[1, 0, 3].isfinite().any()
        got[1, 0, 3] = clean[1, 0, 3]
        assert torch.equal(got, clean)


@pytest.mark.backends("cpu", "cuda", "triton")
def test_rows_further_apart_than_32_bits_count(backend, far_rows):
    far_rows.copy_(torch.randn(5, 4))
    for shape in ((1, 1, 5, 4), (1, 5, 1, 4), (5, 1, 1, 4)):
        strides = [far_rows.stride(0) if size == 5 else 0 for size in shape[:3]]
        far, near = far_rows.as_strided(shape, (*strides, 1)), far_rows.contiguous().view(shape)
        out, lse = tk.lookup_gather(far, far, far)
        same, same_lse = tk.lookup_gather(near, near, near)
        assert torch.equal(out, same) and torch.equal(lse, same_lse)
        assert torch.equal(tk.lookup_scatter(far, far, far, lse), tk.lookup_scatter(near, near, near, lse))
        grad = torch.randn(shape, device=far.device).half().transpose(1, 2)
        saved = out.transpose(1, 2), lse, 0.5
        kernel = backends.implementation(backend, "lookup_gather_backward")
        for one, other in zip(*(kernel(grad, lse, t, t, t, *saved) for t in (far, near)), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(0, 2, 3, 5, 8), (2, 0, 3, 5, 8), (1, 2, 3, 100, 0)])
def test_nothing_to_look_up(device, shape):
    own = drawn(shape, device=device).leaves()
    results = fused(own)
    results = (*results, *torch.autograd.grad(loss(results, 2), own))
    assert [t.shape for t in results] == [own.q.shape, own.q.shape[:3], own.k.shape, *(t.shape for t in own)]
    assert all(t.isfinite().all() for t in results)
    if not shape[-1]:
        torch.testing.assert_close(results[1], torch.full_like(results[1], math.log(100)))


@pytest.mark.backends("cuda", "triton")
def test_heads_that_are_too_wide(backend, device):
    most = {"triton": 128, "cuda": 256}[backend]
    q = torch.randn(1, 1, 3, most + 1, device=device)
    with pytest.raises(RuntimeError, match=rf"lookup_gather: .*at most {most} channels a head, got {most + 1}"):
        tk.lookup_gather(q, q, q)
    with pytest.raises(RuntimeError, match=rf"lookup_scatter: .*at most {most} channels a head, got {most + 1}"):
        tk.lookup_scatter(q, q, q, q[..., 0])


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
def test_bad_input_names_the_argument(name):
    call = drawn((2, 2, 3, 9, 8))
    change, error, words = BAD[name]
    with pytest.raises(error, match="tokred_kernels.lookup_gather: " + words):
        tk.lookup_gather(**{"q": call.q, "k": call.k, "v": call.v, **change(call)})
