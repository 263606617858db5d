# SPDX-License-Identifier: MIT
import pytest
import torch
from support import golden, slow

import tokred_kernels as tk


def test_reproduces_the_authors_code(device):
    arrays, params = golden("tome_kth_0.npz", device)
    token_map = tk.kth_bipartite_match(arrays["metric"], **params)
    torch.testing.assert_close(tk.merge(arrays["x"], token_map), arrays["merged_mean"])
    torch.testing.assert_close(tk.unmerge(arrays["merged_mean"], token_map), arrays["unmerged"])


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 11, *slow(36, 197)])
@pytest.mark.parametrize("k", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_equals_the_reference(device, tokens, k, prefix):
    if prefix > tokens:
        pytest.skip("another test covers a prefix longer than N")
    metric = torch.randint(-1, 2, (2, tokens, 4), device=device).float()
    token_map = tk.kth_bipartite_match(metric, k, num_prefix=prefix)
    with tk.use_backend("reference"):
        expected = tk.kth_bipartite_match(metric, k, num_prefix=prefix)
    assert torch.equal(token_map.dest, expected.dest)
    if k > 1:
        kept = (tokens - prefix) // k
        assert token_map.num_out == prefix + kept
        assert (token_map.dest[:, prefix + kept * k :] == -1).all(), "tokens past a multiple of k are dropped"
        assert (token_map.count.sum(1) == prefix + kept * k).all()


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda m: tk.kth_bipartite_match(m, 0), ValueError, "k must be at least 1, got 0"),
        (lambda m: tk.kth_bipartite_match(m, 2.0), TypeError, "k must be an int, got float"),
        (lambda m: tk.kth_bipartite_match(m, 2, num_prefix=10), ValueError, "num_prefix must be at most N = 9"),
        (lambda m: tk.kth_bipartite_match(m.long(), 2), TypeError, "metric must be float32"),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(2, 9, 4))
