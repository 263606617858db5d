# SPDX-License-Identifier: MIT
"""The CUDA kernels of merge, unmerge and their gradients, run on the host, against the reference backend."""

import pytest
import torch
from emulated import DTYPES, all_floats, flat, floats, whole_numbers

from tokred_kernels.backends.reference import merge, to_csr, unmerge

REDUCES = {"sum": 0, "mean": 1, "amax": 2}


def random_map(images, tokens, num_out, long_slot=False):
    dest = torch.randint(-1, num_out, (images, tokens), dtype=torch.int32)
    if long_slot:
        dest[0, : tokens // 2] = num_out - 1
    return dest, to_csr.to_csr(dest, num_out)


def emulated_merge(emulator, x, weight, views, reduce, want_sum=True, **options):
    members, begin, count = views
    channels = x.shape[2]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.full((begin.numel() * channels,), -7, dtype=x.dtype)
    total = torch.full((begin.numel(),), -7, dtype=acc) if want_sum else None
    integers = (x.stride(1), begin.numel(), channels, DTYPES[x.dtype], REDUCES[reduce])
    weights = None if weight is None else weight.flatten()
    buffers = [flat(x), weights, members, begin.flatten(), count.flatten(), y, total]
    emulator.call("merge", integers, buffers, **options)
    return y.view(*begin.shape, channels), None if total is None else total.view(begin.shape)


# Channels: one; vectors of an element, of 4 and of 16 bytes; in float64 more than a warp has in flight.
@all_floats
@pytest.mark.parametrize("channels", [1, 6, 33, 384])
@pytest.mark.parametrize("reduce", ["sum", "mean", "amax"])
def test_merge(emulator, channels, dtype, reduce):
    dest, views = random_map(2, 90, 40, long_slot=True)
    x = whole_numbers(2, 90, channels, dtype=dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [None] if reduce == "amax" else [None, whole_numbers(2, 90, low=1, dtype=acc)]
    for weight in weights:
        y, total = emulated_merge(emulator, x, weight, views, reduce, reverse=weight is None)
        expected, expected_total = merge.merge(x, weight, dest, 40, reduce, True)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        if reduce != "amax":
            torch.testing.assert_close(total, expected_total, rtol=0, atol=0)


@pytest.mark.parametrize("reduce", ["sum", "mean", "amax"])
def test_merge_without_channels_still_sums_weights(emulator, reduce):
    dest, views = random_map(2, 90, 40, long_slot=True)
    weight = None if reduce == "amax" else whole_numbers(2, 90, low=1)
    x = torch.zeros(2, 90, 0)
    y, total = emulated_merge(emulator, x, weight, views, reduce)
    assert y.shape == (2, 40, 0)
    assert torch.equal(total, merge.merge(x, weight, dest, 40, "sum", True)[1])


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_merge_backward_without_channels_still_passes_sums_on(emulator, reduce):
    dest, views = random_map(2, 90, 40, long_slot=True)
    empty, grad_total, ones = torch.zeros(2, 90, 0), whole_numbers(2, 40), torch.ones(2, 90)
    total = merge.merge(empty, ones, dest, 40, "sum", True)[1]
    grads = (torch.zeros(2, 40, 0), grad_total, empty, torch.zeros(2, 40, 0), ones, total, dest, views, reduce)
    _, grad_weight = emulated_backward(emulator, *grads)
    assert torch.equal(grad_weight, unmerge.unmerge(grad_total[..., None], dest)[..., 0])


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(torch.bfloat16, 2), (torch.float16, 4), (torch.bfloat16, 8), (torch.float32, 4)],
    ids=str,
)
def test_merge_of_unaligned_rows(emulator, dtype, offset):
    dest, views = random_map(2, 33, 20)
    x = whole_numbers(2, 33, 70, dtype=dtype)[..., :64]
    y, _ = emulated_merge(emulator, x, None, views, "sum", want_sum=False, offset=offset)
    torch.testing.assert_close(y, merge.merge(x, None, dest, 20, "sum", False)[0], rtol=0, atol=0)


@floats
@pytest.mark.parametrize("reduce", ["sum", "mean", "amax"])
def test_merge_passes_nan_on(emulator, dtype, reduce):
    dest, views = random_map(1, 120, 9, long_slot=True)
    x = whole_numbers(1, 120, 16, dtype=dtype)
    x[0, ::7, 3] = torch.nan
    x[0, ::11, 5] = torch.inf
    y, _ = emulated_merge(emulator, x, None, views, reduce)
    torch.testing.assert_close(y, merge.merge(x, None, dest, 9, reduce, False)[0], rtol=0, atol=0, equal_nan=True)


def test_mean_of_equal_tokens_is_that_token(emulator):
    _, views = random_map(1, 300, 5, long_slot=True)
    x = torch.full((1, 300, 8), 0.1)
    y, _ = emulated_merge(emulator, x, torch.full((1, 300), 1.0), views, "mean")
    torch.testing.assert_close(y, torch.full_like(y, 0.1), rtol=3e-6, atol=0)


def test_merge_of_real_numbers_stays_within_rounding(emulator):
    dest, views = random_map(2, 200, 30, long_slot=True)
    x, weight = torch.randn(2, 200, 40), torch.rand(2, 200) + 0.5
    y, total = emulated_merge(emulator, x, weight, views, "mean")
    expected, expected_total = merge.merge(x.double(), weight.double(), dest, 30, "mean", True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.double(), expected_total, rtol=1e-6, atol=0)
    again, _ = emulated_merge(emulator, x, weight, views, "mean", reverse=True)
    assert torch.equal(y, again)


def emulated_backward(emulator, grad_y, grad_total, x, y, weight, total, dest, views, reduce, need_x=True):
    images, num_out, channels = grad_y.shape
    acc = torch.float64 if grad_y.dtype == torch.float64 else torch.float32
    rows = dest.numel()
    grad_x = torch.full((rows * channels,), -7, dtype=grad_y.dtype) if need_x else None
    grad_weight = None if weight is None else torch.full((rows,), -7, dtype=acc)
    integers = (x.stride(1), images, dest.shape[1], num_out, channels, DTYPES[grad_y.dtype], REDUCES[reduce])
    flattened = [None if t is None else t.flatten() for t in (grad_y, grad_total)]
    flattened += [flat(x), *(None if t is None else t.flatten() for t in (y, weight, total))]
    members, begin, count = views
    buffers = [*flattened, dest.flatten(), members, begin.flatten(), count.flatten(), grad_x, grad_weight]
    emulator.call("merge_backward", integers, buffers)
    return (
        None if grad_x is None else grad_x.view(*dest.shape, channels),
        None if grad_weight is None else grad_weight.view(dest.shape),
    )


@all_floats
@pytest.mark.parametrize("channels", [1, 6, 33, 384])
@pytest.mark.parametrize(
    ("reduce", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("mean", True), ("amax", False)]
)
def test_merge_backward(emulator, channels, dtype, reduce, weighted):
    dest, views = random_map(2, 70, 30, long_slot=True)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x = whole_numbers(2, 70, channels, dtype=dtype)
    weight = whole_numbers(2, 70, low=1, dtype=acc) if weighted else None
    # The reference in float64, so that the expected gradients have one rounding at the end.
    leaf = x.double().requires_grad_()
    leaf_weight = weight.double().requires_grad_() if weighted else None
    y, total = merge.merge(leaf, leaf_weight, dest, 30, reduce, True)
    grad_y = whole_numbers(*y.shape, dtype=dtype)
    grad_total = whole_numbers(*y.shape[:2], dtype=acc) if weighted else None
    value = (y * grad_y.double()).sum() + (0 if grad_total is None else (total * grad_total).sum())
    value.backward()

    kept_y = y.detach().to(dtype)
    kept_total = total.detach().to(acc) if weighted else None
    grad_x, grad_weight = emulated_backward(
        emulator, grad_y, grad_total, x, kept_y, weight, kept_total, dest, views, reduce
    )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad_x.double(), leaf.grad, rtol=2 * eps, atol=0)
    if weighted:
        # y was rounded to the dtype, and each of C products with it is off by as much.
        bound = 4 * eps * max(channels, 1) * 9 + 1e-5
        torch.testing.assert_close(grad_weight.double(), leaf_weight.grad, rtol=0, atol=bound)
        alone = emulated_backward(
            emulator, grad_y, grad_total, x, kept_y, weight, kept_total, dest, views, reduce, need_x=False
        )[1]
        assert torch.equal(alone, grad_weight)


def test_amax_backward_with_nan(emulator):
    dest = torch.tensor([[0, 0, 0, 1, -1]], dtype=torch.int32)
    x = torch.tensor([[[1.0, torch.nan], [2.0, 1.0], [2.0, torch.nan], [torch.nan, 5.0], [0.0, 0.0]]])
    y = merge.merge(x, None, dest, 2, "amax", False)[0]
    grad, _ = emulated_backward(
        emulator, torch.ones(1, 2, 2), None, x, y, None, None, dest, to_csr.to_csr(dest, 2), "amax"
    )
    assert grad.tolist() == [[[0, 0.5], [0.5, 0], [0.5, 0.5], [1, 1], [0, 0]]]


@all_floats
@pytest.mark.parametrize("channels", [1, 6, 33, 384])
@pytest.mark.parametrize("padding", [0, 2, 8])
def test_unmerge(emulator, channels, dtype, padding):
    dest, _ = random_map(2, 50, 20)
    y = torch.randn(2, 20, channels + padding).to(dtype)[..., :channels]
    x = torch.full((100 * channels,), -7, dtype=dtype)
    emulator.call("unmerge", (y.stride(1), 2, 50, 20, channels, DTYPES[dtype]), [flat(y), dest.flatten(), x])
    assert torch.equal(x.view(2, 50, channels), unmerge.unmerge(y, dest))


@pytest.mark.parametrize(
    ("channels", "size", "alignment", "expected"),
    [
        (1024, 2, 0, (16, 128, 5, 8)),
        (384, 2, 0, (16, 48, 4, 16)),
        (384, 2, 4, (4, 192, 5, 8)),
        (33, 2, 0, (2, 33, 4, 16)),
        (33, 4, 0, (4, 33, 4, 16)),
        (1, 2, 0, (2, 1, 0, 256)),
        (8, 2, 0, (16, 1, 0, 256)),
        (3, 8, 0, (8, 3, 0, 256)),
        (0, 4, 0, (16, 0, 0, 256)),
    ],
)
def test_rows_are_cut_into_the_widest_vectors(emulator, channels, size, alignment, expected):
    assert emulator.call("row_config", (channels, size, alignment)) == expected
