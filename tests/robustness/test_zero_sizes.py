# SPDX-License-Identifier: MIT
"""Every CPU op without images, tokens, slots or channels; `make sanitize` reports null pointers that kernels use."""

import itertools

import pytest
import torch

import tokred_kernels as tk
from tokred_kernels.dtypes import accumulator_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = list(itertools.product((0, 2), (0, 1, 5), (0, 3)))  # batch, tokens, channels


@pytest.fixture(autouse=True)
def cpu():
    with tk.use_backend("cpu"):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch,tokens,channels", SIZES)
def test_merge_and_unmerge(batch, tokens, channels, dtype):
    x = torch.randn(batch, tokens, channels).to(dtype).requires_grad_()
    weight = torch.rand(batch, tokens, requires_grad=True)
    for slots in (0, 1, 4):
        dest = torch.full((batch, tokens), min(slots, 1) - 1, dtype=torch.int32)
        token_map = tk.TokenMap(dest, slots)
        for options in ({"reduce": "sum"}, {"reduce": "amax"}, {}, {"weight": weight}, {"weight": weight * 0}):
            y = tk.merge(x, token_map, **options)
            assert y.shape == (batch, slots, channels)
            assert (y[:, 1:] == 0).all()
            y.sum().backward()
        restored = tk.unmerge(y.detach().requires_grad_(), token_map)
        assert restored.shape == x.shape
        restored.sum().backward()
        assert torch.equal(token_map.then(tk.TokenMap.identity(batch, slots)).dest, dest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch,tokens,channels", SIZES)
def test_selectors(batch, tokens, channels, dtype):
    x = torch.randn(batch, tokens, channels).to(dtype)
    score = torch.randn(batch, tokens)
    maps = [
        tk.bipartite_match(x, 1),
        tk.bipartite_merge(x, 1).token_map,
        tk.adaptive_bipartite_match(x, threshold=0.1, count="image"),
        tk.keep_topk(score, 0, num_prefix=0),
        tk.keep_topk(score, tokens // 2, num_prefix=0, fuse=True),
    ]
    if tokens > 1:
        maps.append(tk.window_match(x, 0.5, grid=(1, tokens), window=(1, 2), num_prefix=0))
    for token_map in maps:
        assert token_map.dest.shape == (batch, tokens)
        assert token_map.count.sum() == (token_map.dest >= 0).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch,channels", [(0, 0), (0, 3), (2, 0), (2, 3)])
def test_attention(batch, channels, dtype):
    q, k, v = (torch.randn(batch, 2, 5, channels).to(dtype).requires_grad_() for _ in range(3))
    out, importance = tk.token_attention(q, k, v, importance="mean")
    (out.sum() + importance.sum()).backward()
    gathered, lse = tk.lookup_gather(q, k, v)
    (gathered.sum() + lse.sum()).backward()
    scattered = tk.lookup_scatter(q, k, v, torch.zeros(batch, 2, 5, dtype=accumulator_of(q)))
    scattered.sum().backward()
    assert out.shape == gathered.shape == scattered.shape == q.grad.shape == q.shape
