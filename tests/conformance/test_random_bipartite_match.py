# SPDX-License-Identifier: MIT
import pytest
import torch
from support import slow

import tokred_kernels as tk


def draw(device, seed=3):
    return torch.Generator(device).manual_seed(seed)


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, *slow(197)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_equals_the_reference_on_the_same_draw(device, tokens, prefix):
    if prefix > tokens:
        pytest.skip("another test covers a prefix longer than N")
    metric = torch.randint(-1, 2, (3, tokens, 4), device=device).float()
    for r in sorted({0, 1, tokens // 2, tokens - 1, tokens + 5}):
        token_map = tk.random_bipartite_match(metric, r, num_prefix=prefix, generator=draw(device))
        with tk.use_backend("reference"):
            expected = tk.random_bipartite_match(metric, r, num_prefix=prefix, generator=draw(device))
        assert torch.equal(token_map.dest, expected.dest)
        assert token_map.num_out == tokens - max(0, min(r, tokens - prefix - 1))
        assert torch.equal(token_map.dest[:, :prefix].cpu(), torch.arange(prefix).int().expand(3, prefix))


def test_each_source_joins_its_most_similar_destination(device):
    metric = torch.randn(2, 40, 8, device=device)
    token_map = tk.random_bipartite_match(metric, 25, generator=draw(device))
    cosine = torch.nn.functional.cosine_similarity(metric[:, :, None], metric[:, None], dim=-1).cpu()
    order = torch.rand(2, 40, device=device, generator=draw(device)).argsort(1).cpu()
    dest = token_map.dest.cpu()
    for image in range(2):
        sources, destinations = order[image, :25], order[image, 25:]
        assert dest[image, destinations].tolist() == list(range(15))
        assert torch.equal(dest[image, sources].long(), cosine[image][sources][:, destinations].argmax(1))


def test_draws_anew_for_each_image_and_call(device):
    metric = torch.randn(2, 60, 4, device=device)
    first, second = (tk.random_bipartite_match(metric, 30).dest for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda m: tk.random_bipartite_match(m, -2), ValueError, "r must be at least 0, got -2"),
        (lambda m: tk.random_bipartite_match(m, "3"), TypeError, "r must be an int, got str"),
        (lambda m: tk.random_bipartite_match(m, 1, num_prefix=10), ValueError, "num_prefix must be at most N = 9"),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(2, 9, 4))
