# SPDX-License-Identifier: MIT
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokred_kernels as tk


@st.composite
def maps(draw, tokens=None):
    batch = draw(st.integers(1, 3))
    tokens = draw(st.integers(1, 24))
    slots = draw(st.integers(1, 24))
    row = st.lists(st.integers(-1, slots - 1), min_size=tokens, max_size=tokens)
    return tk.TokenMap.from_dest(torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch))), slots)


def values(token_map, channels=3):
    return torch.randn(token_map.batch, token_map.num_tokens, channels, dtype=torch.float64)


@settings(deadline=None, max_examples=60)
@given(maps())
def test_merge_keeps_the_weighted_sum(token_map):
    x, size = values(token_map), torch.rand(token_map.batch, token_map.num_tokens, 1, dtype=torch.float64) + 0.1
    y, total = tk.merge_wavg(x, token_map, size)
    kept = (token_map.dest >= 0)[..., None]
    torch.testing.assert_close((y * total).sum(1), (x * size * kept).sum(1))
    torch.testing.assert_close(total.sum(1), (size * kept).sum(1))


@settings(deadline=None, max_examples=60)
@given(maps())
def test_unmerge_after_merge_is_the_mean_of_the_group(token_map):
    x = values(token_map)
    back = tk.unmerge(tk.merge(x, token_map), token_map)
    same = (token_map.dest[:, :, None] == token_map.dest[:, None]) & (token_map.dest >= 0)[:, None]
    mean = same.double() @ x / same.sum(-1, keepdim=True).clamp(min=1)
    torch.testing.assert_close(back, torch.where((token_map.dest < 0)[..., None], 0.0, mean))


@settings(deadline=None, max_examples=60)
@given(maps(), st.data())
def test_composition_equals_doing_both(first, data):
    row = st.lists(st.integers(-1, 4), min_size=first.num_out, max_size=first.num_out)
    rows = data.draw(st.lists(row, min_size=first.batch, max_size=first.batch))
    second = tk.TokenMap.from_dest(torch.tensor(rows), 5)
    x, ones = values(first), torch.ones(first.batch, first.num_tokens, 1, dtype=torch.float64)
    once, once_size = tk.merge_wavg(x, first.then(second), ones)
    twice, twice_size = tk.merge_wavg(*reversed_arguments(tk.merge_wavg(x, first, ones), second))
    torch.testing.assert_close(once, twice)
    torch.testing.assert_close(once_size, twice_size)


def reversed_arguments(merged, token_map):
    """merge_wavg's result as its next arguments; empty slots weigh nothing, so they need a weight that is not 0 / 0."""
    x, size = merged
    return x, token_map, size.clamp(min=1e-300)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 5), st.integers(1, 4), st.integers(0, 2**31 - 1))
def test_sizes_sum_to_the_tokens(tokens, r, prefix, channels, seed):
    x = torch.randn(2, tokens, channels, generator=torch.Generator().manual_seed(seed))
    out = tk.bipartite_merge(x, r, num_prefix=min(prefix, tokens))
    assert (out.size.sum(1) == tokens).all()
    assert out.x.shape[1] == out.token_map.num_out == out.size.shape[1]
    lead = min(prefix, tokens)
    assert torch.equal(out.x[:, :lead], x[:, :lead])
    again = tk.bipartite_merge(x, r, num_prefix=lead)
    assert torch.equal(again.x, out.x)
