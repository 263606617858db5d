# SPDX-License-Identifier: MIT
"""Match, merge, unmerge and their gradients in Triton against the reference; conftest.py says where they run."""

import itertools

import pytest
import torch
from support import DTYPES, assert_sum_close, assert_valid_match, assert_views, golden, random_map

import tokred_kernels as tk


def on_reference(call, *arguments, **settings):
    with tk.use_backend("reference"):
        return call(*arguments, **settings)


def assert_same_map(token_map, expected):
    """The same destinations, and members, begin and count that say the same as these."""
    assert token_map.num_out == expected.num_out
    assert torch.equal(token_map.dest, expected.dest)
    assert_views(token_map)


# One token, one pair, an odd tail, more than one block of destinations, ViT sizes, the second and third block of
# sources. Channels: less than a product's least, odd, one block of each config, more than one. Heads as dtypes allow.
SIZES = [
    (1, 64, 1, torch.float32),
    (2, 1, 1, torch.bfloat16),
    (3, 33, 3, torch.float32),
    (3, 64, 1, torch.float16),
    (17, 1, 1, torch.float32),
    (17, 16, 3, torch.float32),
    (17, 33, 3, torch.float16),
    (17, 64, 3, torch.bfloat16),
    (17, 130, 1, torch.float16),
    (17, 130, 3, torch.bfloat16),
    (66, 24, 1, torch.bfloat16),
    (67, 64, 1, torch.float32),
]


@pytest.mark.parametrize("tokens,channels,heads,dtype", SIZES, ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_match_at_any_size(device, tokens, channels, heads, dtype, prefix):
    shape = (2, tokens, channels) if heads == 1 else (2, heads, tokens, channels)
    metric = torch.randn(shape, device=device).to(dtype)
    for r in {tokens // 2} if tokens > 17 else {tokens // 4, tokens // 2}:
        token_map = tk.bipartite_match(metric, r, num_prefix=prefix)
        assert_valid_match(token_map, metric, r, prefix=prefix)
        assert_views(token_map)


@pytest.mark.parametrize("tokens", [6, 7])
@pytest.mark.parametrize("class_token,distill_token", list(itertools.product([False, True], repeat=2)))
def test_match_at_any_r(device, tokens, class_token, distill_token):
    flags = {"class_token": class_token, "distill_token": distill_token}
    metric = torch.randint(-1, 2, (3, tokens, 4), device=device).float()
    for r in range(1, tokens // 2 + 1):
        assert_same_map(tk.bipartite_match(metric, r, **flags), on_reference(tk.bipartite_match, metric, r, **flags))


@pytest.mark.parametrize(
    "tokens,heads,dtype,prefix", [(197, 3, torch.bfloat16, 1), (198, 1, torch.float32, 2)], ids=str
)
def test_match_of_a_vit(device, tokens, heads, dtype, prefix):
    # Keys as attention has them: (B, H, N, d), permuted out of one projection.
    keys = torch.randn(2, tokens, 3, heads, 64, device=device).to(dtype).permute(2, 0, 3, 1, 4)[1]
    assert not keys.is_contiguous()
    token_map = tk.bipartite_match(keys, 16, num_prefix=prefix)
    assert_valid_match(token_map, keys, 16, prefix=prefix)
    assert_same_map(tk.bipartite_match(keys.contiguous(), 16, num_prefix=prefix), token_map)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mean_over_heads_in_a_launch_of_its_own_is_the_same(device, dtype, monkeypatch):
    from tokred_kernels.backends.triton import rank_candidates as module

    keys = torch.randn(2, 21, 3, 16, device=device).to(dtype).transpose(1, 2)
    expected = tk.bipartite_match(keys, 7)
    monkeypatch.setattr(module, "MEAN_IN_MATCH_BLOCKS", 0)
    assert_same_map(tk.bipartite_match(keys, 7), expected)


# Each select config, and no config, where sources are sorted; made to serve a few tokens, as the interpreter is slow.
@pytest.mark.parametrize("block", [128, 512, 1024, None])
def test_map_of_any_config(device, block, monkeypatch):
    from tokred_kernels.backends.triton import bipartite_match as module
    from tokred_kernels.backends.triton.configs import SELECT_CONFIGS

    metric = torch.randint(-1, 2, (2, 41, 4), device=device).to(torch.float16)
    monkeypatch.setattr(module, "select_config", lambda *_: SELECT_CONFIGS.get(block))
    for prefix in (0, 2):
        got = tk.bipartite_match(metric, 12, num_prefix=prefix)
        assert_same_map(got, on_reference(tk.bipartite_match, metric, 12, num_prefix=prefix))
    got = tk.kth_bipartite_match(metric, 4, num_prefix=2)
    assert_same_map(got, on_reference(tk.kth_bipartite_match, metric, 4, num_prefix=2))


def test_match_of_many_tokens(device):
    metric = torch.randint(-1, 2, (1, 290, 4), device=device).to(torch.float16)
    assert_same_map(tk.bipartite_match(metric, 90), on_reference(tk.bipartite_match, metric, 90))


@pytest.mark.parametrize("tokens,k,prefix", [(17, 4, 1), (19, 2, 0), (3, 5, 1), (130, 8, 0)])
def test_kth_match_drops_the_tail(device, tokens, k, prefix):
    metric = torch.randint(-1, 2, (2, tokens, 4), device=device).float()
    got = tk.kth_bipartite_match(metric, k, num_prefix=prefix)
    if tokens - prefix < k:
        assert got.dest.tolist() == [[*range(prefix), *[-1] * (tokens - prefix)]] * 2
        return
    assert_same_map(got, on_reference(tk.kth_bipartite_match, metric, k, num_prefix=prefix))
    assert int((got.dest == -1).sum()) == 2 * ((tokens - prefix) % k)


@pytest.mark.parametrize("tokens,r,prefix", [(9, 4, 0), (40, 1, 1), (40, 36, 2)])
def test_random_match_takes_lists(device, tokens, r, prefix):
    metric = torch.randint(-1, 2, (3, tokens, 4), device=device).to(torch.bfloat16)

    def drawn():
        generator = torch.Generator(device).manual_seed(1)
        return tk.random_bipartite_match(metric, r, num_prefix=prefix, generator=generator)

    assert_same_map(drawn(), on_reference(drawn))


def test_lists_may_leave_tokens_out(device):
    from tokred_kernels.ops.bipartite_match import match
    from tokred_kernels.partition import Partition

    metric = torch.randint(-1, 2, (2, 12, 4), device=device).float()
    sources = torch.tensor([[9, 2, 5], [4, 11, 3]], dtype=torch.int32, device=device)
    destinations = torch.tensor([[8, 3, 10, 4], [2, 9, 5, 10]], dtype=torch.int32, device=device)
    partition = Partition(1, 1, 3, 4, 0, 0, False, 2, sources, destinations)
    got = match(metric, partition)
    assert_same_map(got, on_reference(match, metric, partition))
    assert (got.dest == -1).sum(1).tolist() == [4, 4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lower_index(device, dtype):
    # Coordinates of -1, 0, 1 in 4 dimensions: cosines are exact, most of them tie, and some tokens are zero.
    metric = torch.randint(-1, 2, (4, 67, 4), device=device).to(dtype)
    for r, prefix in ((1, 0), (20, 1), (33, 0)):
        got = tk.bipartite_match(metric, r, num_prefix=prefix)
        assert_same_map(got, on_reference(tk.bipartite_match, metric, r, num_prefix=prefix))


def test_identical_tokens(device):
    dest = tk.bipartite_match(torch.full((2, 12, 4), 3.0, device=device), 2).dest
    # Sources 0 and 1 (tokens 0 and 2) join destination 0 (token 1), whose slot follows the four unmerged sources.
    assert dest.tolist() == [[4, 4, 4, 5, 0, 6, 1, 7, 2, 8, 3, 9]] * 2


def test_zero_tokens_are_similar_to_nothing(device):
    metric = torch.randn(1, 20, 8, device=device).abs()  # all similarities positive
    metric[0, 3] = 0
    metric[0, 4] = 1e-20  # its squared norm is under the least that counts
    token_map = tk.bipartite_match(metric, 9)
    assert token_map.count[0, token_map.dest[0, [3, 4]].long()].tolist() == [1, 1]
    assert_valid_match(token_map, metric, 9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_never_win(device, value, dtype):
    metric = torch.randint(-1, 2, (1, 20, 4), device=device).to(dtype)
    metric[0, 3] = value  # a destination
    metric[0, 4, 2] = value  # a source
    got = tk.bipartite_match(metric, 8)
    assert got.count[0, got.dest[0, 3]] == 1
    assert_same_map(got, on_reference(tk.bipartite_match, metric, 8))
    everything = torch.full_like(metric, value)
    assert_same_map(tk.bipartite_match(everything, 8), on_reference(tk.bipartite_match, everything, 8))


def test_no_images_and_no_channels(device):
    token_map = tk.bipartite_match(torch.randn(0, 8, 4, device=device), 2)
    assert token_map.dest.shape == (0, 8)
    assert token_map.begin.shape == (0, 6)
    # Without channels all tokens are zero: similar to nothing, so ties alone decide.
    for shape in ((1, 6, 0), (1, 3, 6, 0)):
        assert tk.bipartite_match(torch.randn(shape, device=device), 1).dest.tolist() == [[2, 2, 0, 3, 1, 4]]


@pytest.mark.parametrize("name,call", [("tome_0.npz", tk.bipartite_match), ("tome_kth_0.npz", tk.kth_bipartite_match)])
def test_reproduces_the_authors_code(device, name, call):
    arrays, params = golden(name)
    token_map = call(arrays["metric"].to(device), **params)
    assert_same_map(token_map, on_reference(call, arrays["metric"].to(device), **params))


# (tokens, slots): one to one, all into one (a slot of many members), empty slots, odd, more than one block of rows.
MAPS = [(1, 1), (3, 2), (5, 9), (17, 9), (75, 1), (90, 70)]
# One, odd, each config's block, and more than one block.
CHANNELS = [1, 33, 64, 128, 130, 256]


@pytest.mark.parametrize("tokens,slots", MAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_and_unmerge_equal_float64(device, tokens, slots, dtype):
    for channels in CHANNELS if tokens == 17 else (33,):
        token_map = random_map(2, tokens, slots, dropped=0.2 if tokens > 3 else 0.0)
        there = token_map.to(device)
        x = torch.randn(2, tokens, channels).to(dtype)
        weight = torch.rand(2, tokens) + 0.5
        terms = int(token_map.count.max())
        for reduce, w in (("sum", None), ("sum", weight), ("mean", None), ("mean", weight), ("amax", None)):
            got = tk.merge(x.to(device), there, reduce=reduce, weight=None if w is None else w.to(device)).cpu()
            wide = None if w is None else w.double()
            exact = on_reference(tk.merge, x.double(), token_map, reduce=reduce, weight=wide)
            if reduce == "amax":
                assert torch.equal(got.double(), exact)
            else:
                magnitude = on_reference(tk.merge, x.double().abs(), token_map, reduce=reduce, weight=wide)
                assert_sum_close(got, exact, terms, magnitude)
        y, size = tk.merge_wavg(x.to(device), there, weight.to(device))
        total = torch.zeros(2, slots + 1, dtype=torch.float64)
        total.scatter_add_(1, token_map.dest.long() % (slots + 1), weight.double())
        assert_sum_close(size.cpu(), total[:, :slots], terms)
        assert torch.equal(tk.unmerge(y, there), on_reference(tk.unmerge, y, there))


@pytest.mark.parametrize("reduce,weighted", [("sum", True), ("mean", True), ("mean", False), ("amax", False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_equal_float64(device, dtype, reduce, weighted):
    for (tokens, slots), channels in (((17, 9), 33), ((17, 9), 130), ((75, 1), 64), ((5, 9), 1)):
        token_map = random_map(2, tokens, slots, dropped=0.2)
        x, grad = torch.randn(2, tokens, channels).to(dtype), torch.randn(2, slots, channels).to(dtype)
        weight = torch.rand(2, tokens) + 0.5

        def gradients(x, weight, grad, token_map):
            inputs = [x.detach().requires_grad_()]
            if weighted:
                inputs.append(weight.detach().requires_grad_())
            y = tk.merge(inputs[0], token_map, reduce=reduce, weight=inputs[1] if weighted else None)
            return torch.autograd.grad(y, inputs, grad)

        got = gradients(x.to(device), weight.to(device), grad.to(device), token_map.to(device))
        want = on_reference(gradients, x.double(), weight.double(), grad.double(), token_map)
        assert got[0].dtype == dtype
        assert_sum_close(got[0].cpu(), want[0], 4)
        if weighted:
            assert got[1].dtype == torch.float32
            # y comes back rounded to its dtype, and a dot product adds a rounding a channel.
            scale = torch.finfo(dtype).eps * (x.abs().amax() + 1) * grad.abs().sum(-1).amax()
            assert (got[1].cpu() - want[1]).abs().max() <= float(scale)


def test_gradients_of_sizes_alone_and_together(device):
    token_map = random_map(2, 11, 4, dropped=0.2, device=device)
    x, grad, grad_size = (torch.randn(2, n, c, device=device) for n, c in ((11, 5), (4, 5), (4, 1)))
    weight = torch.rand(2, 11, 1, device=device) + 0.5

    def gradients(dtype, x_too):
        x_in, w_in = x.to(dtype).requires_grad_(x_too), weight.to(dtype).requires_grad_()
        y, size = tk.merge_wavg(x_in, token_map, w_in)
        inputs = (w_in, x_in) if x_too else (w_in,)
        return torch.autograd.grad((y, size), inputs, (grad.to(dtype), grad_size.to(dtype)))

    for x_too in (False, True):
        want = on_reference(gradients, torch.float64, x_too)
        for got, exact in zip(gradients(torch.float32, x_too), want, strict=True):
            assert_sum_close(got, exact, 11, exact.abs() + 4)


def test_gradient_of_unmerge(device):
    token_map = random_map(2, 17, 5, dropped=0.2, device=device)
    y = torch.randn(2, 5, 33, device=device, requires_grad=True)
    grad = torch.randn(2, 17, 33, device=device)
    (got,) = torch.autograd.grad(tk.unmerge(y, token_map), y, grad)
    exact = on_reference(tk.merge, grad.double(), token_map, reduce="sum")
    assert_sum_close(got, exact, 17, on_reference(tk.merge, grad.double().abs(), token_map, reduce="sum"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_maximum_divides_its_gradient_between_ties(device, dtype):
    nan = float("nan")
    rows = [[0.0, 2.0, nan], [0.0, 1.0, 7.0], [-1.0, 2.0, nan], [-0.0, 2.0, 1.0], [5.0, 5.0, nan], [9.0, 9.0, 9.0]]
    x = torch.tensor([rows], device=device).to(dtype).requires_grad_()
    token_map = tk.TokenMap.from_dest(torch.tensor([[0, 0, 0, 0, 2, -1]]), 3).to(device)
    y = tk.merge(x, token_map, reduce="amax")
    assert torch.equal(
        y.isnan(), torch.tensor([[[False, False, True], [False] * 3, [False, False, True]]], device=device)
    )
    assert (y[0, 1] == 0).all()
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 6.0))
    assert grad.tolist() == [[[2, 2, 3], [2, 0, 0], [0, 2, 3], [2, 2, 0], [6, 6, 6], [0, 0, 0]]]


def test_nan_stays_in_its_slot(device):
    token_map = tk.TokenMap.from_dest(torch.tensor([[0, 1, 0, 1, -1]])).to(device)
    x = torch.ones(1, 5, 3, device=device)
    x[0, 0, 1] = float("nan")
    x[0, 4] = float("nan")  # dropped
    for reduce in ("sum", "mean", "amax"):
        y = tk.merge(x, token_map, reduce=reduce)[0]
        assert y.isnan().tolist() == [[False, True, False], [False, False, False]], reduce


def test_movers_read_strided_tokens(device):
    token_map = random_map(2, 9, 4, device=device)
    back = random_map(2, 20, 9, dropped=0.2, device=device)
    views = {
        "rows apart": torch.randn(2, 9, 3, 8, device=device)[:, :, 1],
        "channels apart": torch.randn(2, 9, 16, device=device)[:, :, ::2],
        "transposed": torch.randn(2, 8, 9, device=device).transpose(1, 2),
        "expanded": torch.randn(2, 1, 8, device=device).expand(2, 9, 8),
        "images swapped": torch.randn(9, 2, 8, device=device).transpose(0, 1),
    }
    for name, x in views.items():
        same = x.contiguous()
        assert torch.equal(tk.merge(x, token_map), tk.merge(same, token_map)), name
        assert torch.equal(tk.unmerge(x, back), tk.unmerge(same, back)), name
        grads = []
        for of in (x, same):
            leaf = of.detach().requires_grad_()
            grads.append(torch.autograd.grad(tk.merge(leaf, token_map, reduce="amax").sum(), leaf)[0])
        assert torch.equal(*grads), name


def test_no_images_no_tokens_no_slots_and_no_channels(device):
    for batch, tokens, slots, channels in ((0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 3, 0), (2, 5, 0, 4)):
        token_map = random_map(batch, tokens, slots, device=device)
        for reduce in ("mean", "amax"):
            x = torch.randn(batch, tokens, channels, device=device, requires_grad=True)
            y = tk.merge(x, token_map, reduce=reduce)
            assert y.shape == (batch, slots, channels)
            y.sum().backward()
            assert (x.grad == 0).all()
        weight = torch.rand(batch, tokens, device=device, requires_grad=True)
        y, size = tk.merge_wavg(x.detach(), token_map, weight)
        want = on_reference(tk.merge_wavg, torch.ones(batch, tokens, 1, device=device), token_map, weight)[1]
        torch.testing.assert_close(size, want)
        (grad,) = torch.autograd.grad(size.sum(), weight)
        assert torch.equal(grad, (token_map.dest >= 0).float())
        assert tk.unmerge(y.detach(), token_map).shape == x.shape


def test_two_runs_are_equal_bit_by_bit(device):
    metric = torch.randn(2, 67, 64, device=device)
    runs = []
    for _ in range(2):
        x = metric.clone().requires_grad_()
        token_map = tk.bipartite_match(metric, 30)
        y, size = tk.merge_wavg(x, token_map)
        again = tk.unmerge(y, token_map)
        runs.append((token_map.dest, *token_map.views(), y, size, *torch.autograd.grad(again.sin().sum(), x)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
