# SPDX-License-Identifier: MIT
import pytest
import torch
import torch.nn.functional as F
from dense_attention import ALL_DTYPES, IMPORTANCES, TERMS, Call, assert_rounded, drawn, exact
from support import slow

import tokred_kernels as tk

OP = "token_attention"

# None, one, few, and more than a kernel takes at a time; an image of nothing at the start, inside and at the end.
LENGTHS = [(5, 0, 1, 70, 1), (1,), (0, 3, 2), (17, 0)]
terms = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)


def packed_call(lengths, heads, channels, dtype, terms):
    rows = sum(lengths)
    return drawn((rows, heads, channels), dtype, terms, (rows,))


def image_of(call, rows):
    """Return the rows of one image as a call on that image alone."""
    own = call.map(lambda t: t[rows])
    heads_first = (t.transpose(0, 1)[None] for t in own[:3])
    return Call(*heads_first, *(None if t is None else t[None] for t in own[3:]))


def rows_of(lengths):
    """The rows of each image that has any."""
    start = 0
    for length in lengths:
        if length:
            yield slice(start, start + length)
        start += length


def check_packed(call, lengths, where, importance=None, scale=None, move=lambda t: t):
    """As `check`, image by image."""
    dtype = call.q.dtype
    packed = tk.Packing.of(lengths, torch.device(where))
    moved, leaves = call.map(lambda t: t.to(where)).leaves()
    passed = moved._replace(q=move(moved.q), k=move(moved.k), v=move(moved.v))
    results = [r for r in passed.run(importance=importance, scale=scale, packed=packed) if r is not None]
    assert results[0].shape == call.q.shape
    assert results[0].dtype == dtype
    grads = [torch.randn(r.shape).to(r.dtype) for r in results]
    gradients = torch.autograd.grad(results, leaves, [g.to(where) for g in grads])
    for rows in rows_of(lengths):
        grad_out = grads[0][rows].transpose(0, 1)[None]
        grad_importance = grads[1][rows][None] if importance else None
        truth = exact(image_of(call, rows), grad_out, importance, grad_importance, scale)
        rounding = truth.roundings, dtype
        for part, want, size in zip(results, truth.results, truth.result_sizes, strict=True):
            got = part[rows].transpose(0, 1)[None] if part.dim() == 3 else part[rows][None]
            assert_rounded(got, want, size, *rounding)
        for part, want, size in zip(gradients, truth.gradients, truth.gradient_sizes, strict=True):
            got = part[rows].transpose(0, 1)[None] if part.dim() == 3 else part[rows][None]
            assert_rounded(got, want, size, *rounding)


@pytest.mark.parametrize("lengths", [LENGTHS[0], *slow(*((lengths,) for lengths in LENGTHS[1:]))], ids=str)
@terms
@pytest.mark.parametrize("importance", [None, *IMPORTANCES])
def test_every_packed_image_equals_the_image_alone(device, lengths, terms, importance):
    check_packed(packed_call(lengths, 2, 16, torch.float32, terms), lengths, device, importance)


@pytest.mark.backends("cpu", "cuda", "triton")
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
@terms
def test_no_rows_at_all(device, lengths, terms):
    check_packed(packed_call(lengths, 2, 16, torch.float32, terms), lengths, device, "mean")


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("channels", [5, *slow(1, 32, 40, 64, 128)])
def test_any_dtype_and_number_of_channels(device, channels, dtype):
    lengths = (65, 0, 1, 33, 197)
    for number, names in enumerate(TERMS.values()):
        importance = IMPORTANCES[(number + channels) % 3]
        check_packed(packed_call(lengths, 3, channels, dtype, names), lengths, device, importance, 0.2)


LAYOUTS = {
    "of q, k, v in one": lambda t: torch.stack([t, t, t], 1)[:, 1],
    "heads outside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels apart": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda t: F.pad(t, (3, 5, 1, 2, 4, 1))[4:-1, 1:-2, 3:-5],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_reads_strided_rows(device, layout):
    for lengths, heads, channels in (((9, 0, 20, 1), 3, 12), ((4, 3), 1, 1)):
        for names in ((), ("size", "policy")):
            check_packed(packed_call(lengths, heads, channels, torch.float32, names), lengths, device, move=layout)


def test_equals_images_of_one_length(device):
    call = drawn((4, 2, 33, 16), torch.float32, ("size", "policy")).map(lambda t: t.to(device))
    rows = Call(*(t.transpose(1, 2).flatten(0, 1) for t in call[:3]), *(t.flatten() for t in call[3:]))
    out, worth = rows.run(importance="mean", packed=tk.Packing.of((33,) * 4, torch.device(device)))
    want = call.run(importance="mean")
    assert torch.equal(out.view(4, 33, 2, 16).transpose(1, 2), want[0])
    assert torch.equal(worth.view(4, 33), want[1])


def test_size_and_policy_may_carry_a_last_dimension(device):
    lengths = (9, 4)
    call = packed_call(lengths, 2, 8, torch.float32, ("size", "policy")).map(lambda t: t.to(device))
    packed = tk.Packing.of(lengths, torch.device(device))
    with_last = call._replace(size=call.size[:, None], policy=call.policy[:, None])
    assert torch.equal(with_last.run(packed=packed)[0], call.run(packed=packed)[0])


def test_follows_a_packed_map(device):
    x = torch.randn(3, 40, 8, device=device)
    token_map = tk.adaptive_bipartite_match(x, threshold=0.6, count="image")
    y, size = tk.merge_wavg(x, token_map)
    assert len(set(token_map.packed.lengths)) > 1, "all images keep the same number"
    q = y.view(-1, 2, 4)
    out, worth = tk.token_attention(q, q, q, size=size, importance="class", packed=token_map.packed)
    for image, rows in enumerate(rows_of(token_map.packed.lengths)):
        alone = q[rows].transpose(0, 1)[None]
        want = tk.token_attention(alone, alone, alone, size=size[rows][None], importance="class")
        assert torch.equal(out[rows], want[0][0].transpose(0, 1)), image
        assert torch.equal(worth[rows], want[1][0])


def test_nan_stays_in_its_packed_image(device):
    lengths = (9, 3, 12)
    packed = tk.Packing.of(lengths, torch.device(device))
    for names in TERMS.values():
        call = packed_call(lengths, 2, 8, torch.float32, names).map(lambda t: t.to(device))
        clean = call.run(importance="mean", packed=packed)
        for name in ("q", "k", "v"):
            broken = call._replace(**{name: getattr(call, name).clone()})
            getattr(broken, name)[9:12] = torch.nan
            out, worth = broken.run(importance="mean", packed=packed)
            assert out[9:12].isnan().all()
            for rows in (slice(0, 9), slice(12, 24)):
                assert torch.equal(out[rows], clean[0][rows])
                assert torch.equal(worth[rows], clean[1][rows])


@pytest.mark.backends("reference", "cpu")
@terms
def test_gradcheck(device, terms):
    lengths = (3, 0, 1, 4)
    call = packed_call(lengths, 2, 3, torch.float64, terms)
    if call.policy is not None:  # from the bounds, which a finite difference may not leave
        call = call._replace(policy=call.policy.double() * 0.98 + 0.01)
    _, leaves = call.map(lambda t: t.double()).leaves()
    names = [name for name, t in zip(Call._fields, call, strict=True) if t is not None]
    packed = tk.Packing.of(lengths, torch.device("cpu"))

    def run(*tensors):
        return call._replace(**dict(zip(names, tensors, strict=True))).run(importance="mean", packed=packed)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda q, p: tk.token_attention(q, q, q, packed=p.lengths), TypeError, "packed must be a Packing, got tuple"),
        (lambda q, p: tk.token_attention(q, q, q, packed=True), TypeError, "packed must be a Packing, got bool"),
        (
            lambda q, p: tk.token_attention(q[None], q[None], q[None], packed=p),
            ValueError,
            r"q must be \(T, H, d\), packed, got shape \(1, 9, 2, 4\)",
        ),
        (lambda q, p: tk.token_attention(q[1:], q[1:], q[1:], packed=p), ValueError, r"q must have the 9 rows of"),
        (lambda q, p: tk.token_attention(q, q, q[:, :1], packed=p), ValueError, r"v must have q's shape \(9, 2, 4\)"),
        (lambda q, p: tk.token_attention(q, q, q, packed=p.to("meta")), ValueError, "packed is on meta but q is on"),
        (
            lambda q, p: tk.token_attention(q, q, q, packed=p, size=torch.ones(1, 9)),
            ValueError,
            r"size must be \(9,\) or \(9, 1\), got \(1, 9\)",
        ),
        (
            lambda q, p: tk.token_attention(q, q, q, packed=p, policy=torch.ones(8)),
            ValueError,
            r"policy must be \(9,\) or \(9, 1\), got \(8,\)",
        ),
        (
            lambda q, p: tk.token_attention(q, q, q, packed=p, policy=torch.full((9, 1), 1.5)),
            ValueError,
            r"policy must be from 0 to 1, got values from 1\.5 to 1\.5",
        ),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=rf"^tokred_kernels\.token_attention: .*{words}"):
        call(torch.randn(9, 2, 4), tk.Packing.of((4, 5), torch.device("cpu")))
