# SPDX-License-Identifier: MIT
"""Token attention apart from its values: determinism, the choice of backend, and accepted and rejected input."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from dense_attention import ALL_DTYPES, KERNELS, TERMS, accumulator, drawn
from torch.utils.flop_counter import FlopCounterMode

import tokred_kernels as tk
from tokred_kernels.backends import native

terms = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
dtypes = pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)


@KERNELS
def test_two_runs_are_equal_bit_by_bit(backend):
    call, leaves = drawn((2, 3, 197, 64), torch.float32, ("size", "policy")).map(lambda t: t.to(backend)).leaves()
    runs = []
    for _ in range(2):
        out, received = call.run(importance="mean")
        runs.append((out, received, *torch.autograd.grad(out.sin().sum() + received.sin().sum(), leaves)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@dtypes
def test_the_number_of_threads_changes_no_bit(dtype):
    call, leaves = drawn((3, 3, 65, 40), dtype, ("size", "policy")).leaves()
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out, received = call.run(importance="mean")
            grads = torch.autograd.grad((out, received), leaves, (torch.ones_like(out), torch.ones_like(received)))
            runs.append((out, received, *grads))
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
        out, received = broken.run(importance="mean")
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
        assert torch.equal(received[1], clean[1][1])
        assert received[0].isnan().any() == (name != "v")
        after = torch.autograd.grad([out.square().sum(), received.square().sum()], leaves)
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
def test_plain_attention_is_torchs(counted, which, dtype, monkeypatch):
    monkeypatch.setattr(native, "AMX", False)
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
def test_sizes_alone_are_torchs_bias(counted, which, dtype, monkeypatch):
    monkeypatch.setattr(native, "AMX", False)
    call = drawn((2, 3, 33, 16), dtype, ("size",))
    mask = call.size.to(accumulator(dtype)).log()[:, None, None, :]
    with tk.use_backend(which):
        out = call.run()[0]
    assert len(counted) == 1
    assert torch.equal(counted[0]["attn_mask"], mask)
    assert torch.equal(out, F.scaled_dot_product_attention(*call[:3], attn_mask=mask))


@pytest.mark.parametrize("cast", ["given", "autocast"])
@pytest.mark.parametrize("dtype,rounding", [(torch.float16, 1.2e-3), (torch.bfloat16, 8e-3)])
def test_sizes_are_not_rounded_to_half_precision(counted, dtype, rounding, cast, monkeypatch):
    monkeypatch.setattr(native, "AMX", False)
    q, v = torch.zeros(1, 1, 64, 64), torch.eye(64).view(1, 1, 64, 64)
    size = torch.arange(1.0, 192.0, 3.0)[None]
    with torch.autocast("cpu", dtype, enabled=cast == "autocast"):
        out = tk.token_attention(*(t.to(torch.float32 if cast == "autocast" else dtype) for t in (q, q, v)), size=size)
    assert out.dtype == dtype
    assert len(counted) == 1
    wanted = (size / size.sum()).expand(64, 64)
    torch.testing.assert_close(out[0, 0].float(), wanted, rtol=rounding, atol=0)


@pytest.mark.parametrize("which", ["auto", "cpu"])
def test_with_tiles_bfloat16_is_ours(counted, which, monkeypatch):
    monkeypatch.setattr(native, "AMX", True)
    with tk.use_backend(which):
        for names in ((), ("size",)):
            drawn((2, 3, 33, 16), torch.bfloat16, names).run()
            assert not counted
        drawn((2, 3, 33, 16), torch.float16).run()
    assert len(counted) == 1


@pytest.mark.parametrize("which", ["auto", "cpu"])
@pytest.mark.parametrize(
    ("width", "shortest", "torchs"),
    [(64, 97, 96), (80, 101, 112), (63, 129, 127), (32, 129, 128), (64, 160, 144), (32, 160, 97)],
)
def test_with_wide_vectors_long_float32_is_ours(counted, which, width, shortest, torchs, monkeypatch):
    monkeypatch.setattr(native, "WIDE_VECTORS", True)
    long = drawn((1, 2, shortest, width), torch.float32, ("size",))
    with tk.use_backend(which):
        out = long.run()[0]
        assert not counted
        bias = long.size.log()[:, None, None, :]
        torch.testing.assert_close(out, F.scaled_dot_product_attention(*long[:3], attn_mask=bias))
        drawn((1, 2, shortest, width), torch.float32).run()
        drawn((1, 2, torchs, width), torch.float32, ("size",)).run()
        drawn((1, 2, shortest, width), torch.float64, ("size",)).run()
        drawn((1, 2, shortest, width), torch.float16, ("size",)).run()
        assert len(counted) == 5
        monkeypatch.setattr(native, "WIDE_VECTORS", False)
        long.run()
    assert len(counted) == 6


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_long_attention_is_torchs_where_somebody_listens(counted, fresh_dynamo, monkeypatch):
    monkeypatch.setattr(native, "WIDE_VECTORS", True)
    q, size = torch.randn(1, 2, 160, 64), torch.full((1, 160), 2.0)

    def attend(q):
        return tk.token_attention(q, q, q, size=size)

    torch.compile(attend, backend="eager", fullgraph=True)(q)
    torch.func.vmap(attend)(q[None])
    with FlopCounterMode(display=False):
        attend(q)
    assert len(counted) == 3
    attend(q)
    assert len(counted) == 3


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
torch.set_num_threads(1)
def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
def attend(which, tokens):
    q, k, v = (torch.randn(1, 4, tokens, 16, requires_grad=True) for _ in range(3))
    policy = torch.rand(1, tokens, requires_grad=True)
    with tk.use_backend(which):
        out, received = tk.token_attention(q, k, v, size=policy + 0.5, policy=policy, importance="mean")
        (out.sum() + received.square().sum()).backward()
attend("cpu", 64), attend("reference", 64)
peaks = [peak()]
for which in ("cpu", "reference"):
    attend(which, 2000)
    peaks.append(peak())
print(*peaks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory where Linux says it")
def test_the_weights_are_never_stored():
    weights = 4 * 2000 * 2000 * 4 // 1024  # those of all heads, in KiB
    printed = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, check=True).stdout
    before, with_kernel, with_weights = map(int, printed.split())
    assert with_kernel - before < weights / 5
    assert with_weights - before > weights, "so much shows where weights are stored"


@pytest.mark.gpu
def test_the_weights_are_never_stored_on_a_gpu():
    call, leaves = drawn((1, 4, 2000, 16), torch.float32, ("size", "policy")).map(torch.Tensor.cuda).leaves()
    with tk.use_backend("triton"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out, received = call.run(importance="mean")
        torch.autograd.grad(out.sum() + received.square().sum(), leaves)
    assert torch.cuda.max_memory_allocated() - before < 4 * 2000 * 2000 * 4 / 5


Q = (2, 3, 9, 4)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda q: tk.token_attention(q.tolist(), q, q), TypeError, "q must be a torch.Tensor, got list"),
        (lambda q: tk.token_attention(q, q, q, scale=q.mean()), TypeError, "scale must be a number, got Tensor"),
        (lambda q: tk.token_attention(q, q, q, scale="big"), TypeError, "scale must be a number, got str"),
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
            "importance must be one of class, mean, last, got 'cls'",
        ),
        (lambda q: tk.token_attention(q, q, q, importance=True), TypeError, "importance must be .*got True"),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=rf"^tokred_kernels\.token_attention: .*{words}"):
        call(torch.randn(Q))


def test_a_backend_that_cannot_serve_raises():
    call = drawn((1, 2, 9, 4), torch.float32, ("policy",))
    with (
        tk.use_backend("cuda"),
        pytest.raises(
            RuntimeError, match=r'token_attention: the backend "cuda" was requested .*no cuda kernel.*: .*cpu'
        ),
    ):
        call.run()


def test_on_meta_tensors_shapes_alone():
    q = torch.randn(2, 3, 17, 8, device="meta")
    out, received = tk.token_attention(q, q, q, importance="mean")
    assert (out.shape, received.shape) == ((2, 3, 17, 8), (2, 17))
