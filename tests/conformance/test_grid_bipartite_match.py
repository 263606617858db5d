# SPDX-License-Identifier: MIT
import math

import pytest
import torch
from support import (
    DTYPES,
    assert_follows,
    assert_views,
    cosines,
    dest_of,
    exact_tokens,
    golden,
    match_slots,
    partners,
    window_members,
)
from torch._subclasses import FakeTensorMode

import tokred_kernels as tk
from tokred_kernels.partition import Partition


def test_reproduces_the_authors_code(device):
    arrays, params = golden("tomesd_0.npz")
    grid, stride = (params["h"], params["w"]), (params["sy"], params["sx"])
    metric = arrays["metric"].to(device)
    token_map = tk.grid_bipartite_match(metric, params["r"], grid=grid, stride=stride)
    merged = tk.merge(metric, token_map)
    assert merged.shape == arrays["merged_mean"].shape
    torch.testing.assert_close(tk.unmerge(merged, token_map).cpu(), arrays["unmerged"])


def truth(metric, r, destinations, prefix):
    """`dest` of each image, the destinations being those, by index."""
    number = metric.shape[1]
    sources = sorted(set(range(prefix, number)).difference(destinations))
    dests = []
    for image in metric:
        best = partners(cosines(image), sources, destinations)
        dests.append(dest_of(match_slots(best, destinations, r, lead=range(prefix)), number))
    return dests


# One cell, cells of a row and of a column, the whole grid, a rim below, at the right and both.
CASES = [
    ((1, 2), (1, 2), 0),
    ((2, 3), (2, 3), 1),
    ((4, 8), (1, 2), 2),
    ((8, 4), (2, 1), 5),
    ((14, 14), (2, 2), 0),
    ((7, 9), (2, 2), 1),
    ((7, 11), (3, 4), 0),
    ((5, 5), (2, 5), 0),
]


@pytest.mark.parametrize("grid,stride,prefix", CASES)
def test_is_what_the_definition_says(device, grid, stride, prefix):
    number = prefix + math.prod(grid)
    cells = window_members(prefix, grid, stride)
    corners = sorted(cell[0] for cell in cells)
    most = math.prod(grid) - len(cells)
    for channels, dtype in zip((1, 16, 64), DTYPES, strict=True):
        metric = exact_tokens(2, number, channels)
        for r in sorted({1, (most + 1) // 2, most}):
            settings = {"grid": grid, "stride": stride, "num_prefix": prefix}
            token_map = tk.grid_bipartite_match(metric.to(device, dtype), r, **settings)
            assert token_map.num_out == number - r
            assert token_map.dest.tolist() == truth(metric, r, corners, prefix)
            assert_views(token_map)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_right_at_model_sizes(device, dtype):
    metric = torch.randn(1, 4096, 40).to(dtype)
    token_map = tk.grid_bipartite_match(metric.to(device), 2048, grid=(64, 64))
    corners = [cell[0] for cell in window_members(0, (64, 64), (2, 2))]
    others = sorted(set(range(4096)).difference(corners))
    lists = torch.tensor([others], dtype=torch.int32), torch.tensor([corners], dtype=torch.int32)
    assert_follows(token_map, metric, Partition(0, 1, 3072, 1024, 0, 0, False, 2048, *lists))


@pytest.mark.parametrize("grid,stride,prefix", CASES[1:])
def test_draws_one_destination_in_each_cell_for_all_images(device, grid, stride, prefix):
    number = prefix + math.prod(grid)
    cells = window_members(prefix, grid, stride)
    most = math.prod(grid) - len(cells)
    metric = exact_tokens(3, number, 16)
    settings = {"grid": grid, "stride": stride, "num_prefix": prefix, "random": True}

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return tk.grid_bipartite_match(metric.to(device), most, generator=generator, **settings)

    token_map, again, other = draw(3), draw(3), draw(4)
    assert torch.equal(token_map.dest, again.dest)
    drawn = torch.randint(math.prod(stride), (len(cells),), generator=torch.Generator().manual_seed(3)).tolist()
    destinations = sorted(cell[place] for cell, place in zip(cells, drawn, strict=True))
    assert token_map.dest.tolist() == truth(metric, most, destinations, prefix)
    if len(cells) > 4:
        assert not torch.equal(token_map.dest, other.dest)
    assert_views(token_map)


def test_draws_anew_at_every_call_and_every_place(device):
    metric = torch.randn(1, 400, 8, device=device)
    seen = set()
    for _ in range(3):
        # With no source joined but one, the last slots hold the destinations alone.
        dest = tk.grid_bipartite_match(metric, 1, grid=(20, 20), random=True).dest[0].cpu()
        destinations = (dest >= 400 - 1 - 100).nonzero().flatten().tolist()
        assert len(destinations) == 101
        seen.add(tuple(destinations))
    assert len(seen) == 3
    places = {(n // 20 % 2, n % 2) for n in destinations}
    assert len(places) == 4
    before = torch.get_rng_state()
    tk.grid_bipartite_match(metric, 1, grid=(20, 20))
    assert torch.equal(torch.get_rng_state(), before), "only random=True draws"


def test_reads_strided_metrics_and_leaves_no_gradient(device):
    metric = torch.randn(2, 8, 24, device=device, requires_grad=True).transpose(1, 2)
    token_map = tk.grid_bipartite_match(metric, 7, grid=(4, 6))
    assert not token_map.dest.requires_grad
    assert torch.equal(token_map.dest, tk.grid_bipartite_match(metric.detach().contiguous(), 7, grid=(4, 6)).dest)
    alike = torch.randn(1, 24, 8, device=device).expand(3, 24, 8)
    dest = tk.grid_bipartite_match(alike, 7, grid=(4, 6)).dest
    assert torch.equal(dest, tk.grid_bipartite_match(alike[:1], 7, grid=(4, 6)).dest.expand(3, -1))


def test_identity_where_nothing_can_merge(device):
    metric = torch.randn(2, 13, 4, device=device)
    identity = [list(range(13))] * 2
    assert tk.grid_bipartite_match(metric, 0, grid=(3, 4), num_prefix=1).dest.tolist() == identity
    assert tk.grid_bipartite_match(metric, 5, grid=(3, 4), stride=(1, 1), num_prefix=1).dest.tolist() == identity
    assert tk.grid_bipartite_match(metric[:, :1], 5, grid=(1, 1), stride=(1, 1)).dest.tolist() == [[0], [0]]


def test_r_is_at_most_the_number_of_sources(device):
    metric = torch.randn(2, 12, 4, device=device)
    token_map = tk.grid_bipartite_match(metric, 1000, grid=(3, 4))
    assert token_map.num_out == 2
    assert torch.equal(token_map.dest, tk.grid_bipartite_match(metric, 10, grid=(3, 4)).dest)


def test_empty_batch_and_no_channels(device):
    token_map = tk.grid_bipartite_match(torch.randn(0, 12, 4, device=device), 3, grid=(3, 4))
    assert (token_map.dest.shape, token_map.num_out) == ((0, 12), 9)
    alone = tk.grid_bipartite_match(torch.randn(1, 4, 0, device=device), 1, grid=(2, 2))
    assert alone.dest.tolist() == [[2, 2, 0, 1]]


@pytest.mark.backends("reference", "cpu")
def test_cached_splits_are_plain_tensors(device):
    # The split of a grid is kept between calls: one made of stand-ins must not be.
    def call(metric):
        return tk.grid_bipartite_match(metric, 9, grid=(7, 8)).dest

    metric = torch.randn(2, 56, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call(metric)
        call(mode.from_tensor(metric))
    torch.compile(call, fullgraph=True, backend="eager")(metric)
    torch.func.functionalize(call)(metric)
    with torch.inference_mode():
        call(metric)
    dest = call(metric)
    assert type(dest) is torch.Tensor
    expected = truth(metric, 9, [cell[0] for cell in window_members(0, (7, 8), (2, 2))], 0)
    assert dest.tolist() == expected


def test_a_backend_that_cannot_run_the_call_raises():
    with tk.use_backend("cuda"), pytest.raises(RuntimeError, match=r'"cuda" was requested .*can: reference, cpu'):
        tk.grid_bipartite_match(torch.randn(1, 9, 4), 5, grid=(3, 3))


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda m: tk.grid_bipartite_match(m, -1, grid=(3, 4)), ValueError, "r must be at least 0, got -1"),
        (lambda m: tk.grid_bipartite_match(m, 1.5, grid=(3, 4)), TypeError, "r must be an int, got float"),
        (lambda m: tk.grid_bipartite_match(m, True, grid=(3, 4)), TypeError, "r must be an int, got bool"),
        (lambda m: tk.grid_bipartite_match(m, 1, grid=(3, 5)), ValueError, r"N - num_prefix = 12 - 0 .*\(3, 5\).*15"),
        (lambda m: tk.grid_bipartite_match(m, 1, grid=(3, 4), num_prefix=1), ValueError, "N - num_prefix = 12 - 1 tok"),
        (lambda m: tk.grid_bipartite_match(m, 1, grid=12), TypeError, r"grid must be a pair \(height, width\), got 12"),
        (lambda m: tk.grid_bipartite_match(m, 1, grid=("3", 4)), TypeError, "grid height must be an int, got str"),
        (lambda m: tk.grid_bipartite_match(m, 1, grid=(12, 0)), ValueError, "grid width must be at least 1, got 0"),
        (
            lambda m: tk.grid_bipartite_match(m, 1, grid=(3, 4), stride=(4, 1)),
            ValueError,
            r"stride must fit .*\(4, 1\)",
        ),
        (
            lambda m: tk.grid_bipartite_match(m, 1, grid=(3, 4), stride=(1, 5)),
            ValueError,
            r"stride must fit .*\(1, 5\)",
        ),
        (lambda m: tk.grid_bipartite_match(m, 1, grid=(3, 4), stride=(0, 2)), ValueError, "stride height must be at"),
        (lambda m: tk.grid_bipartite_match(m, 1, grid=(3, 4), stride=2), TypeError, "stride must be a pair"),
        (lambda m: tk.grid_bipartite_match(m, 1, grid=(3, 4), num_prefix=-1), ValueError, "num_prefix must be at"),
        (lambda m: tk.grid_bipartite_match(m[0], 1, grid=(3, 4)), ValueError, r"metric must be \(B, N, D\).*\(12, 4\)"),
        (lambda m: tk.grid_bipartite_match(m.int(), 1, grid=(3, 4)), TypeError, "metric must be float32.*int32"),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=rf"^tokred_kernels\.grid_bipartite_match: .*{words}"):
        call(torch.randn(2, 12, 4))
