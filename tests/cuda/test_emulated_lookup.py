# SPDX-License-Identifier: MIT
"""The CUDA kernels of lookup attention, run on the host, against its definition in float64."""

import pytest
import torch
from dense_lookup import assert_close, dense, drawn
from emulated import DTYPES, flat, floats

# (B, H, M, N, d): one of each; tiles of 32 and of 16 rows exactly, one more, and tails of both sides; each width.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 2, 3, 8),
    (1, 2, 17, 33, 40),
    (1, 1, 32, 64, 32),
    (2, 1, 25, 200, 64),
    (1, 1, 65, 66, 64),
    (1, 1, 33, 50, 100),
    (1, 2, 17, 33, 130),
    (1, 1, 1, 200, 256),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Kernels:
    """The four ops in the emulator, on (B, H, rows, d) tensors of any strides whose last is 1."""

    def __init__(self, emulator, call, scale=None, **options):
        self.emulator, self.call, self.options = emulator, call, options
        batch, heads, compressed, channels = call.q.shape
        self.rows = {"m": (batch, compressed, heads, channels), "n": (batch, call.k.shape[2], heads, channels)}
        scale = channels**-0.5 if scale is None else scale
        self.scale = torch.tensor([scale], dtype=torch.float64)
        self.sizes = (batch, heads, compressed, call.k.shape[2], channels, DTYPES[call.q.dtype])

    def run(self, op, values, *others, results):
        """Run `op`; `results` names the side of each result's rows, or "lse". (B, H, rows, d) and (B, H, M)."""
        call, dtype = self.call, self.call.q.dtype
        made = [
            torch.full(call.q.shape[:3], -7.0) if side == "lse" else torch.full(self.rows[side], -7.0, dtype=dtype)
            for side in results
        ]
        strides = [t.stride()[:3] for t in (call.q, call.k, values)]
        strides += [t.stride()[:3] for t in others if t is not None and t.dim() == 4 and t is not self.out]
        tensors = (call.q, call.k, values, *others)
        buffers = [self.scale, *(None if t is None else flat(t) for t in tensors), *(t.flatten() for t in made)]
        integers = [*self.sizes, *(s for three in strides for s in three)]
        self.emulator.call(op, integers, buffers, **self.options)
        shaped = (b.view(t.shape) for b, t in zip(buffers[-len(made) :], made, strict=True))
        return [t if t.dim() == 3 else t.transpose(1, 2) for t in shaped]

    def forward(self):
        self.out = None
        out, lse = self.run("lookup_gather", self.call.v, results=["m", "lse"])
        (scattered,) = self.run("lookup_scatter", self.call.values, lse, results=["n"])
        self.out, self.lse = out.transpose(1, 2).contiguous(), lse
        return out, lse, scattered

    def backward(self, grad_out, grad_lse, grad_scattered):
        """Of q, k and v of the gather, and of q, k, values and lse of the scatter."""
        others = (grad_out, grad_lse, self.out, self.lse)
        gathered = self.run("lookup_gather_backward", self.call.v, *others, results="mnn")
        others = (grad_scattered, self.lse)
        scattered = self.run("lookup_scatter_backward", self.call.values, *others, results=["m", "n", "m", "lse"])
        return gathered, scattered


def exact_gradients(call, lse, grads, scale=None):
    """In float64; the scatter's weights are made from `lse`, of which they are a function then."""
    exact = call.exact()
    scale = call.q.shape[-1] ** -0.5 if scale is None else scale
    gathered = dense(exact, scale)[:2]
    grad_out, grad_lse, grad_scattered = (None if g is None else g.double() for g in grads)
    loss = (gathered[0] * grad_out).sum() + (0 if grad_lse is None else (gathered[1] * grad_lse).sum())
    of_gather = torch.autograd.grad(loss, exact[:3])
    given = lse.double().requires_grad_()
    weights = (exact.q @ exact.k.transpose(-2, -1) * scale - given[..., None]).exp()
    scattered = weights.transpose(-2, -1) @ exact.values
    leaves = (exact.q, exact.k, exact.values, given)
    return of_gather, torch.autograd.grad((scattered * grad_scattered).sum(), leaves)


def check(emulator, call, scale=None, with_grad_lse=True, layout=lambda t: t, **options):
    """All results, of tensors that lie as `layout` lays them."""
    call = type(call)(*map(layout, call))
    kernels = Kernels(emulator, call, scale, **options)
    got = kernels.forward()
    for g, w in zip(got, dense(call.exact(), scale), strict=True):
        if g.dim() == 3:
            torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)
        else:
            assert_close(g, w)
    grads = (
        layout(torch.randn(call.q.shape).to(call.q.dtype)),
        torch.randn(call.q.shape[:3]) if with_grad_lse else None,
        layout(torch.randn(call.k.shape).to(call.q.dtype)),
    )
    results = kernels.backward(*grads)
    for ours, want in zip(results, exact_gradients(call, kernels.lse, grads, scale), strict=True):
        for g, w in zip(ours, want, strict=True):
            assert g.shape == w.shape
            assert_close(g, w)
    return [*got, *results[0], *results[1]]


@floats
@shapes
def test_equals_float64_with_all_gradients(emulator, shape, dtype):
    check(emulator, drawn(shape, dtype))


@shapes
def test_without_a_gradient_of_lse_and_with_threads_reversed(emulator, shape):
    check(emulator, drawn(shape), with_grad_lse=False, reverse=True)


@pytest.mark.parametrize("shape", [(1, 2, 17, 33, 40), (1, 1, 33, 50, 130)], ids=str)
def test_any_order_of_threads_gives_the_same_bits(emulator, shape):
    call = drawn(shape)
    results = []
    for reverse in (False, True):
        torch.manual_seed(0)
        results.append(check(emulator, call, reverse=reverse))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_scale_of_its_own_and_scores_of_large_spread(emulator):
    check(emulator, drawn((1, 2, 5, 70, 32), spread=8.0), scale=0.7)


LAYOUTS = {
    "heads beside channels": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "images inside": lambda t: t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    "sliced": lambda t: torch.nn.functional.pad(t, (3, 5, 1, 2))[:, :, 1:-2, 3:-5],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(emulator, layout, dtype):
    call = drawn((2, 3, 7, 40, 16), dtype)
    torch.manual_seed(0)
    want = check(emulator, call)
    torch.manual_seed(0)
    got = check(emulator, call, layout=LAYOUTS[layout])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_that_are_not_aligned(emulator):
    for dtype, offset in ((torch.bfloat16, 2), (torch.float16, 8), (torch.float32, 4)):
        check(emulator, drawn((1, 2, 5, 40, 16), dtype), offset=offset)


def test_heads_of_no_channels(emulator):
    out, lse, scattered = Kernels(emulator, drawn((1, 2, 3, 5, 0)), 1.0).forward()
    torch.testing.assert_close(lse, torch.full((1, 2, 3), 5.0).log())
    assert out.numel() == scattered.numel() == 0


def test_no_images(emulator):
    out, *_ = Kernels(emulator, drawn((0, 2, 3, 5, 8))).forward()
    assert out.shape == (0, 2, 3, 8)


def test_nan_stays_in_its_head(emulator):
    call = drawn((2, 2, 4, 50, 16))
    call.k[1, 0, 7, 3] = torch.nan
    for result in Kernels(emulator, call).forward():
        assert not result[0].isnan().any()
        assert result[1, 0].isnan().any()
        assert not result[1, 1].isnan().any()


def test_what_no_kernel_takes_is_told(emulator):
    with pytest.raises(RuntimeError, match=r"lookup_gather: q must have at most 256 channels .*got 257"):
        Kernels(emulator, drawn((1, 1, 2, 5, 257))).forward()
    with pytest.raises(RuntimeError, match="lookup_gather: float64 is not supported on CUDA"):
        Kernels(emulator, drawn((1, 1, 2, 5, 8), torch.float64)).forward()
