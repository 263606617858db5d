# SPDX-License-Identifier: MIT
import pytest
import torch

import tokred_kernels as tk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_a_match_and_a_weighted_merge(device, dtype):
    x = torch.randn(2, 197, 24, device=device).to(dtype)
    keys = torch.randn(2, 3, 197, 8, device=device).to(dtype)
    size = torch.randint(1, 5, (2, 197, 1), device=device).float()
    out = tk.bipartite_merge(x, 16, metric=keys, size=size, class_token=True)
    token_map = tk.bipartite_match(keys, 16, class_token=True)
    y, total = tk.merge_wavg(x, token_map, size)
    assert torch.equal(out.token_map.dest, token_map.dest)
    assert torch.equal(out.x, y)
    assert torch.equal(out.size, total)
    assert out.x.shape == (2, 181, 24)


def test_the_tokens_are_their_own_metric():
    x = torch.randn(2, 20, 6, requires_grad=True)
    out = tk.bipartite_merge(x, 5)
    assert torch.equal(out.token_map.dest, tk.bipartite_match(x, 5).dest)
    out.x.sum().backward()
    assert x.grad is not None


def test_zero_r_changes_nothing(device):
    x = torch.randn(2, 7, 6, device=device)
    out = tk.bipartite_merge(x, 0)
    assert torch.equal(out.x, x)
    assert (out.size == 1).all()


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda x: tk.bipartite_merge(x[0], 1), ValueError, r"x must be \(B, N, C\)"),
        (lambda x: tk.bipartite_merge(x, 1, metric=x[:, :5]), ValueError, "metric must have x's B and N"),
        (lambda x: tk.bipartite_merge(x, 1, metric=x[:1]), ValueError, "metric must have x's B and N"),
        (lambda x: tk.bipartite_merge(x, -1), ValueError, "r must be at least 0"),
        (lambda x: tk.bipartite_merge(x, 1, size=torch.ones(3)), ValueError, "size must be"),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(2, 9, 4))
