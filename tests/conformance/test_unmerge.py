# SPDX-License-Identifier: MIT
import pytest
import torch
from support import (
    DTYPES,
    PACKED_TOKENS,
    assert_sum_close,
    golden,
    images_in,
    images_out,
    random_map,
    random_packed_map,
    slow,
)

import tokred_kernels as tk


@pytest.mark.parametrize("name", ["tome_0.npz", "tome_1.npz"])
def test_reproduces_the_authors_code(name, device):
    arrays, params = golden(name, device)
    token_map = tk.bipartite_match(arrays["metric"], **params)
    assert torch.equal(tk.unmerge(arrays["merged_wavg"], token_map), arrays["unmerged"])


@pytest.mark.parametrize(
    "tokens,slots,channels",
    [
        *((1, 1, 33), (2, 1, 2), (3, 2, 384), (5, 9, 1), (67, 50, 130)),
        *slow((197, 181, 384), (577, 64, 33), (4096, 1000, 384)),
    ],
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_copies_rows_exactly(device, tokens, slots, channels, dtype):
    y = torch.randn(2, slots, channels).to(dtype)
    token_map = random_map(2, tokens, slots, dropped=0.2)
    x = tk.unmerge(y.to(device), token_map.to(device)).cpu()
    dest = token_map.dest.long()
    expected = torch.stack([y[b][dest[b]] for b in range(2)])
    expected[dest < 0] = 0
    assert torch.equal(x, expected)


def test_reads_strided_slots(device):
    token_map = random_map(2, 9, 4, device=device)
    base = torch.randn(2, 4, 3, 8, device=device)
    for y in (base[:, :, 1], base[:, :, 0, ::2], torch.randn(2, 8, 4, device=device).transpose(1, 2)):
        assert torch.equal(tk.unmerge(y, token_map), tk.unmerge(y.contiguous(), token_map))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_the_sum_over_members(device, dtype):
    token_map = random_map(2, 60, 7, dropped=0.1)
    y = torch.randn(2, 7, 33, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn(2, 60, 33).to(dtype)
    (got,) = torch.autograd.grad(tk.unmerge(y, token_map.to(device)), y, grad.to(device))
    with tk.use_backend("reference"):
        want = tk.merge(grad.double(), token_map, reduce="sum")
        magnitude = tk.merge(grad.double().abs(), token_map, reduce="sum")
    assert_sum_close(got.cpu(), want, int(token_map.count.max()), magnitude)


@pytest.mark.backends("reference", "cpu")
def test_gradcheck(device):
    y = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    token_map = random_map(2, 9, 5, dropped=0.2)
    assert torch.autograd.gradcheck(lambda y: tk.unmerge(y, token_map), y)


def test_second_derivatives_raise():
    y = torch.randn(1, 2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(tk.unmerge(y, random_map(1, 4, 2)).pow(2).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="unmerge: second derivatives are not supported"):
        grad.sum().backward()


def test_empty(device):
    for batch, tokens, slots, channels in ((0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 3, 0), (2, 5, 0, 4)):
        y = torch.randn(batch, slots, channels, device=device, requires_grad=True)
        x = tk.unmerge(y, random_map(batch, tokens, slots, device=device))
        assert x.shape == (batch, tokens, channels)
        x.sum().backward()
        assert y.grad.shape == y.shape


@PACKED_TOKENS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_map_unmerges_each_image_as_if_alone(device, tokens, dtype):
    token_map = random_packed_map(tokens, dropped=0.2, device=device)
    for y in (torch.randn(23, 33, device=device).to(dtype), torch.randn(33, 23, device=device).to(dtype).t()):
        x = tk.unmerge(y, token_map)
        assert x.shape == (*token_map.in_shape, 33)
        for image, (rows, back) in enumerate(zip(images_out(y, token_map), images_in(x, token_map), strict=True)):
            assert torch.equal(back.view(1, -1, 33), tk.unmerge(rows, token_map.image(image)))
    assert tk.unmerge(torch.randn(23, 0, device=device), token_map).shape == (*token_map.in_shape, 0)


@pytest.mark.backends("reference", "cpu")
@PACKED_TOKENS
def test_gradcheck_along_a_packed_map(tokens, device):
    token_map = random_packed_map(tokens, dropped=0.2)
    y = torch.randn(23, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: tk.unmerge(y, token_map), y)


@PACKED_TOKENS
def test_bad_input_for_a_packed_map_names_the_argument(tokens):
    token_map = random_packed_map(tokens)
    with pytest.raises(ValueError, match=r"y must be \(T, C\), packed, got shape \(1, 23, 2\)"):
        tk.unmerge(torch.ones(1, 23, 2), token_map)
    with pytest.raises(ValueError, match=r"y is \(22, 2\), the map gives \(23, '?C'?\)"):
        tk.unmerge(torch.ones(22, 2), token_map)
    with pytest.raises(ValueError, match="token_map is on cpu but y is on meta"):
        tk.unmerge(torch.ones(23, 2, device="meta"), token_map)


A_MAP = tk.TokenMap.from_dest(torch.zeros(2, 9, dtype=torch.int64), 3)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda y: tk.unmerge(y[0], A_MAP), ValueError, r"y must be \(B, N, C\), got shape \(3, 4\)"),
        (lambda y: tk.unmerge(y[:, :2], A_MAP), ValueError, r"y is \(2, 2, 4\), the map gives \(2, 3, '?C'?\)"),
        (lambda y: tk.unmerge(y[:1], A_MAP), ValueError, r"token_map must be made for y's slots: y is \(1, 3, 4\)"),
        (lambda y: tk.unmerge(y.long(), A_MAP), TypeError, "y must be float32.*int64"),
        (lambda y: tk.unmerge(y, None), TypeError, "token_map must be a TokenMap, got NoneType"),
        (lambda y: tk.unmerge(y.to("meta"), A_MAP), ValueError, "token_map is on cpu but y is on meta"),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(2, 3, 4))


@pytest.mark.parametrize("outer", [0, 5, 64, 4096])
@pytest.mark.parametrize("stride", [0, 1, 64, 262144])
def test_one_slot_an_image_whatever_its_stride(device, outer, stride):
    """Torch lets the stride over one row be anything, and takes such a tensor for contiguous."""
    y = torch.randn(10000 * 3, device=device).as_strided((3, 1, 64), (outer, stride, 1))
    token_map = tk.TokenMap.from_dest(torch.zeros(3, 4, dtype=torch.int32)).to(device)
    assert torch.equal(tk.unmerge(y, token_map), y.repeat(1, 4, 1))
    leaf = torch.randn(3, 4, 64, device=device, requires_grad=True)
    tk.merge(leaf, token_map, reduce="sum").backward(y)
    assert torch.equal(leaf.grad, y.repeat(1, 4, 1))
