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
    on_reference,
    random_map,
    random_packed_map,
    slow,
)

import tokred_kernels as tk


@pytest.mark.parametrize("name", ["tome_0.npz", "tome_1.npz", "tome_2.npz"])
def test_reproduces_the_authors_code(name, device):
    arrays, params = golden(name, device)
    token_map = tk.bipartite_match(arrays["metric"], **params)
    x, size = tk.merge_wavg(arrays["x"], token_map, arrays["size"])
    torch.testing.assert_close(x, arrays["merged_wavg"])
    torch.testing.assert_close(size, arrays["merged_size"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,slots", [(1, 1), (3, 2), (67, 30), *slow((197, 181), (577, 30))])
def test_equals_float64(device, dtype, tokens, slots):
    x = torch.randn(2, tokens, 48).to(dtype)
    size = torch.randint(1, 30, (2, tokens, 1)).float()
    token_map = random_map(2, tokens, slots, dropped=0.1)
    y, total = tk.merge_wavg(x.to(device), token_map.to(device), size.to(device))
    with tk.use_backend("reference"):
        want, want_total = tk.merge_wavg(x.double(), token_map, size.double())
        magnitude, _ = tk.merge_wavg(x.double().abs(), token_map, size.double())
    assert y.dtype == dtype
    assert total.dtype == torch.float32
    assert_sum_close(y.cpu(), want, int(token_map.count.max()), magnitude)
    assert torch.equal(total.cpu().double(), want_total)


def test_sizes_stay_float32_and_count(device):
    x = torch.randn(1, 300, 4, device=device, dtype=torch.bfloat16)
    token_map = tk.TokenMap.from_dest(torch.zeros(1, 300, dtype=torch.int64)).to(device)
    _, size = tk.merge_wavg(x, token_map)
    assert size.dtype == torch.float32
    assert size.shape == (1, 1, 1)
    assert size.item() == 300


def test_the_size_keeps_its_dimensions(device):
    x = torch.randn(2, 6, 4, device=device)
    token_map = random_map(2, 6, 3, device=device)
    flat = tk.merge_wavg(x, token_map, torch.ones(2, 6, device=device))
    column = tk.merge_wavg(x, token_map, torch.ones(2, 6, 1, device=device))
    none = tk.merge_wavg(x, token_map)
    assert flat[1].shape == (2, 3)
    assert column[1].shape == none[1].shape == (2, 3, 1)
    assert torch.equal(flat[0], column[0])
    assert torch.equal(flat[0], none[0])


@pytest.mark.backends("reference", "cpu")
def test_gradcheck_in_x_and_size(device):
    token_map = random_map(2, 9, 5, dropped=0.2)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    size = (torch.rand(2, 9, 1, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: tk.merge_wavg(x, token_map, s), (x, size))
    assert torch.autograd.gradcheck(lambda s: tk.merge_wavg(x.detach(), token_map, s)[1], size)


def test_gradients_through_two_merges_equal_the_reference(device):
    x = torch.randn(2, 24, 8, device=device, requires_grad=True)
    size = (torch.rand(2, 24, 1, device=device) + 0.5).requires_grad_()
    first, second = random_map(2, 24, 12, device=device), random_map(2, 12, 6, device=device)

    def gradients():
        y, s = tk.merge_wavg(x, first, size)
        y, s = tk.merge_wavg(y.sin(), second, s)
        return torch.autograd.grad(y.pow(2).sum() + s.log1p().sum(), (x, size))

    got = gradients()
    with tk.use_backend("reference"):
        want = gradients()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("of_x", [False, True])
def test_gradients_of_sizes_alone_and_with_those_of_x(device, of_x):
    token_map = random_map(2, 11, 4, dropped=0.2, device=device)
    x, grad, grad_size = (torch.randn(2, n, c, device=device) for n, c in ((11, 5), (4, 5), (4, 1)))
    weight = torch.rand(2, 11, 1, device=device) + 0.5

    def gradients(dtype):
        leaves = weight.to(dtype).requires_grad_(), x.to(dtype).requires_grad_(of_x)
        results = tk.merge_wavg(leaves[1], token_map, leaves[0])
        return torch.autograd.grad(results, leaves[: 1 + of_x], (grad.to(dtype), grad_size.to(dtype)))

    for got, exact in zip(gradients(torch.float32), on_reference(gradients, torch.float64), strict=True):
        assert_sum_close(got, exact, 11, exact.abs() + 4)


@PACKED_TOKENS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_map_merges_each_image_as_if_alone(device, tokens, dtype):
    token_map = random_packed_map(tokens, dropped=0.2, device=device)
    x = torch.randn(*token_map.in_shape, 24, device=device).to(dtype)
    size = torch.randint(1, 5, (*token_map.in_shape, 1), device=device).float()
    y, total = tk.merge_wavg(x, token_map, size)
    assert (y.shape, total.shape, total.dtype) == ((23, 24), (23, 1), torch.float32)
    parts = zip(
        *(images_in(v, token_map) for v in (x, size)), *(images_out(v, token_map) for v in (y, total)), strict=True
    )
    for image, (rows, sizes, merged, merged_sizes) in enumerate(parts):
        alone = tk.merge_wavg(rows, token_map.image(image), sizes)
        torch.testing.assert_close(merged, alone[0])
        assert torch.equal(merged_sizes, alone[1])
    flat, none = tk.merge_wavg(x, token_map, size[..., 0]), tk.merge_wavg(x, token_map)
    assert torch.equal(flat[0], y)
    assert torch.equal(flat[1], total[:, 0])
    assert torch.equal(none[1], token_map.count[:, None].float())


@pytest.mark.backends("reference", "cpu")
@PACKED_TOKENS
def test_gradcheck_along_a_packed_map(tokens, device):
    token_map = random_packed_map(tokens, dropped=0.2)
    x = torch.randn(*token_map.in_shape, 2, dtype=torch.float64, requires_grad=True)
    size = (torch.rand(*token_map.in_shape, 1, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: tk.merge_wavg(x, token_map, s), (x, size))


def test_bad_input_names_the_argument():
    x, token_map = torch.randn(2, 9, 4), tk.TokenMap.identity(2, 9)
    with pytest.raises(ValueError, match=r"merge_wavg: size must be \(2, 9\) or \(2, 9, 1\).*got \(2, 8\)"):
        tk.merge_wavg(x, token_map, torch.ones(2, 8))
    with pytest.raises(TypeError, match=r"merge_wavg: size must be float32.*int64"):
        tk.merge_wavg(x, token_map, torch.ones(2, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"merge_wavg: token_map must be made for x's tokens"):
        tk.merge_wavg(x, tk.TokenMap.identity(2, 8))
