# SPDX-License-Identifier: MIT
import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_views, slots_of

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


SEEDS = st.integers(0, 2**31 - 1)
COUNTS = st.sampled_from(["batch", "image"]) | st.integers(0, 30)


def drawn_tokens(seed, *shape):
    """Tokens of small whole numbers: many ties, some zeros."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


@st.composite
def selections(draw):
    """Drawn tokens, how many of them a selector must leave alone, in front, and the map that it gives."""
    with tk.use_backend(draw(st.sampled_from(["cpu", "reference"]))):
        return select(draw)


def select(draw):
    batch, channels, seed = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(SEEDS)
    height, width, prefix = draw(st.integers(1, 7)), draw(st.integers(2, 7)), draw(st.integers(0, 5))
    x = drawn_tokens(seed, batch, prefix + height * width, channels)
    which = draw(st.sampled_from(["window", "adaptive", "grid", "importance"]))
    grid, threshold = {"grid": (height, width), "num_prefix": prefix}, draw(st.floats(-1.5, 1.5))
    if which == "window":
        window = draw(st.integers(1, height)), draw(st.integers(2, width))
        return x, prefix, tk.window_match(x, threshold, window=window, count=draw(COUNTS), **grid)
    if which == "adaptive":
        level = draw(st.sampled_from([{"threshold": threshold}, {"layer_index": abs(threshold) + 0.1}]))
        return x, prefix, tk.adaptive_bipartite_match(x, num_prefix=prefix, count=draw(COUNTS), **level)
    if which == "grid":
        stride = draw(st.integers(1, height)), draw(st.integers(1, width))
        settings = {"stride": stride, "random": draw(st.booleans()), "generator": torch.Generator().manual_seed(seed)}
        return x, prefix, tk.grid_bipartite_match(x, draw(st.integers(0, 60)), **settings, **grid)
    kept = draw(st.integers(prefix + 1, x.shape[1] + 1))
    return x, prefix, tk.importance_match(x, kept, num_prefix=prefix)[0]


@settings(deadline=None, max_examples=150)
@given(selections())
def test_every_token_has_a_slot_and_every_slot_a_token(selection):
    x, prefix, token_map = selection
    batch, tokens, _ = x.shape
    assert_views(token_map)
    assert (token_map.count > 0).all(), "no slot is empty"
    for image in range(batch):
        alone = token_map.image(image)
        slots = slots_of(alone.dest[0], alone.num_out)
        assert sorted(itertools.chain(*slots)) == list(range(tokens)), "no token is dropped"
        assert slots[:prefix] == [[n] for n in range(prefix)], "what is protected leads, alone and in order"


@settings(deadline=None, max_examples=80)
@given(selections())
def test_sizes_are_conserved_and_merging_again_changes_nothing(selection):
    x, _, token_map = selection
    y, size = tk.merge_wavg(x.double(), token_map)
    totals = [part.sum() for part in (size if token_map.packed is None else size.split(token_map.packed.lengths))]
    assert totals == [x.shape[1]] * x.shape[0]
    back = tk.unmerge(y, token_map)
    torch.testing.assert_close(tk.merge(back, token_map), y)
    torch.testing.assert_close(tk.unmerge(tk.merge(back, token_map), token_map), back)


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(0, 2), st.lists(st.floats(-1.5, 1.5), min_size=2, max_size=5))
def test_a_higher_threshold_never_merges_more(seed, prefix, thresholds):
    x = drawn_tokens(seed, 2, prefix + 20, 3)
    thresholds.sort()
    for match in (
        lambda t, count: tk.window_match(x, t, grid=(4, 5), num_prefix=prefix, count=count),
        lambda t, count: tk.adaptive_bipartite_match(x, threshold=t, num_prefix=prefix, count=count),
    ):
        left = [match(t, "batch").num_out for t in thresholds]
        assert left == sorted(left)
        packed = [match(t, "image").packed.lengths for t in thresholds]
        for image in range(2):
            own = [lengths[image] for lengths in packed]
            assert own == sorted(own)
        assert [max(lengths) for lengths in packed] == left, "the batch merges what its most reluctant image does"


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(0, 3), st.floats(0.1, 20))
def test_packed_images_do_not_see_each_other(seed, lengths, prefix, layer):
    packing = tk.Packing.of(tuple(lengths), torch.device("cpu"))
    # Cosines of these come out the same in any order of summation.
    metric = drawn_tokens(seed, packing.rows, 1) * torch.tensor([1.0, 2.0])
    how = {"layer_index": layer, "num_prefix": prefix}
    token_map = tk.adaptive_bipartite_match(metric, count="image", packed=packing, **how)
    assert_views(token_map)
    for image, rows in enumerate(metric.split(lengths)):
        assert torch.equal(token_map.image(image).dest, tk.adaptive_bipartite_match(rows[None], **how).dest)
