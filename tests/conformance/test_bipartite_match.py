# SPDX-License-Identifier: MIT
import itertools
import subprocess
import sys

import pytest
import torch
from support import DTYPES, assert_same_map, assert_valid_match, golden, on_reference, slow

import tokred_kernels as tk
from tokred_kernels.ops.bipartite_match import match
from tokred_kernels.partition import Partition


@pytest.mark.parametrize("name", ["tome_0.npz", "tome_1.npz", "tome_2.npz"])
def test_reproduces_the_authors_code(name, device):
    arrays, params = golden(name, device)
    token_map = tk.bipartite_match(arrays["metric"], **params)
    assert torch.equal(token_map.source(), arrays["source"])


# One token, the smallest pairs, odd, one tile of sources and of destinations and one more, ViT sizes.
SIZES = [
    *((1, 64), (2, 1), (3, 33), (7, 64), (17, 33), (31, 1), (67, 130)),
    *slow((98, 33), (96, 1), (97, 64), (197, 33), (198, 64), (577, 1), (577, 64), (1024, 33)),
]


@pytest.mark.parametrize("tokens,channels", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_right_at_any_size(device, tokens, dtype, channels):
    metric = torch.randn(2, tokens, channels, device=device).to(dtype)
    for prefix in (0, 1, 2, 5):
        for r in {tokens // 4, tokens // 2}:
            assert_valid_match(tk.bipartite_match(metric, r, num_prefix=prefix), metric, r, prefix=prefix)


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, *slow(13)])
@pytest.mark.parametrize("class_token,distill_token", list(itertools.product([False, True], repeat=2)))
def test_is_right_at_any_r(device, tokens, class_token, distill_token):
    flags = {"class_token": class_token, "distill_token": distill_token}
    metric = torch.randn(3, tokens, 5, device=device)
    for r in range(tokens + 2):
        token_map = tk.bipartite_match(metric, r, **flags)
        limit = (tokens - class_token - distill_token) // 2 if tokens // 2 > distill_token else 0
        assert token_map.num_out == tokens - max(0, min(r, limit))
        assert_valid_match(token_map, metric, r, **flags)
        if class_token and token_map.num_out:
            assert (token_map.dest[:, 0] == 0).all()
            assert (token_map.count[:, 0] == 1).all()


@pytest.mark.parametrize("tokens,channels", slow((197, 384), (577, 1280), (4096, 64)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_right_at_model_sizes(device, tokens, channels, dtype):
    metric = torch.randn(1, tokens, channels, device=device).to(dtype)
    for r in (16, tokens // 2):
        assert_valid_match(tk.bipartite_match(metric, r, class_token=True), metric, r, class_token=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", [17, *slow(197)])
@pytest.mark.parametrize("heads", [1, 3, 12])
def test_averages_heads_read_in_place(device, dtype, tokens, heads):
    qkv = torch.randn(2, tokens, 3, heads, 16, device=device).to(dtype)
    keys = qkv.permute(2, 0, 3, 1, 4)[1]
    assert not keys.is_contiguous()
    assert_valid_match(tk.bipartite_match(keys, 5, num_prefix=1), keys, 5, prefix=1)
    assert torch.equal(
        tk.bipartite_match(keys, 5, num_prefix=1).dest, tk.bipartite_match(keys.contiguous(), 5, num_prefix=1).dest
    )


@pytest.mark.parametrize("tokens", [2, 3, 17, 67, *slow(197, 600)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lower_index(device, tokens, dtype):
    # Coordinates of -1, 0, 1 in 4 dimensions: cosines are exact, and most of them tie; some tokens are zero.
    metric = torch.randint(-1, 2, (4, tokens, 4), device=device).to(dtype)
    for r in sorted({1, tokens // 3, tokens // 2}):
        for prefix in (0, 1, 2):
            token_map = tk.bipartite_match(metric, r, num_prefix=prefix)
            with tk.use_backend("reference"):
                expected = tk.bipartite_match(metric, r, num_prefix=prefix)
            assert torch.equal(token_map.dest, expected.dest)


# The CUDA kernel needs lists of all tokens.
@pytest.mark.backends("reference", "cpu", "triton")
def test_lists_may_leave_tokens_out(device):
    metric = torch.randint(-1, 2, (2, 12, 4), device=device).float()
    sources = torch.tensor([[9, 2, 5], [4, 11, 3]], dtype=torch.int32, device=device)
    destinations = torch.tensor([[8, 3, 10, 4], [2, 9, 5, 10]], dtype=torch.int32, device=device)
    partition = Partition(1, 1, 3, 4, 0, 0, False, 2, sources, destinations)
    got = match(metric, partition)
    assert_same_map(got, on_reference(match, metric, partition))
    assert (got.dest == -1).sum(1).tolist() == [4, 4]


def test_all_tokens_identical(device):
    metric = torch.full((2, 12, 4), 2.0, device=device)
    dest = tk.bipartite_match(metric, 2).dest.cpu()
    # Sources 0 and 1 (tokens 0 and 2) join destination 0 (token 1), whose slot follows the four unmerged sources.
    assert dest[0].tolist() == [4, 4, 4, 5, 0, 6, 1, 7, 2, 8, 3, 9]


def test_zero_tokens_are_similar_to_nothing(device):
    metric = torch.randn(1, 20, 8, device=device).abs()  # all similarities positive
    metric[0, 3] = 0  # a zero destination: in the published code it draws every source
    metric[0, 4] = 0  # a zero source: there it always joins
    token_map = tk.bipartite_match(metric, 9)
    assert token_map.count[0, token_map.dest[0, 3]] == 1
    assert token_map.count[0, token_map.dest[0, 4]] == 1
    assert_valid_match(token_map, metric, 9)


def test_a_zero_token_is_more_similar_than_an_opposite_one(device):
    # Token 0 is opposite to destination 1 and has similarity 0, not NaN, to the zero destination 3: it joins that one.
    # The zero token 2 ties with it, and the lower index goes first.
    metric = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]], device=device)
    assert tk.bipartite_match(metric, 1).dest.tolist() == [[2, 1, 0, 2]]
    with tk.use_backend("reference"):
        assert tk.bipartite_match(metric, 1).dest.tolist() == [[2, 1, 0, 2]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [20, *slow(197)])
def test_nan_and_infinity_never_win(device, value, tokens):
    metric = torch.randn(1, tokens, 8, device=device)
    metric[0, 3] = value
    metric[0, 4, 2] = value
    token_map = tk.bipartite_match(metric, tokens // 2 - 1)
    assert token_map.count[0, token_map.dest[0, 3]] == 1
    with tk.use_backend("reference"):
        assert torch.equal(token_map.dest, tk.bipartite_match(metric, tokens // 2 - 1).dest)


def test_squared_norms_of_half_precision_do_not_overflow(device):
    metric = (torch.randn(1, 33, 64, device=device) * 2000).half()
    assert_valid_match(tk.bipartite_match(metric, 8), metric, 8)


def test_empty_batch_and_no_channels(device):
    token_map = tk.bipartite_match(torch.randn(0, 8, 4, device=device), 2)
    assert token_map.dest.shape == (0, 8)
    assert token_map.num_out == 6
    # Without channels all tokens are zero: similar to nothing, so ties alone decide.
    assert tk.bipartite_match(torch.randn(1, 6, 0, device=device), 1).dest.tolist() == [[2, 2, 0, 3, 1, 4]]


def test_identity_where_nothing_can_merge(device):
    metric = torch.randn(2, 5, 4, device=device)
    for r, prefix in ((0, 0), (3, 5), (3, 4)):
        token_map = tk.bipartite_match(metric, r, num_prefix=prefix)
        assert torch.equal(token_map.dest.cpu(), torch.arange(5).expand(2, 5).int())


def test_both_views_agree(device):
    metric = torch.randn(3, 197, 16, device=device)
    token_map = tk.bipartite_match(metric, 60, num_prefix=1)
    again = tk.TokenMap(token_map.dest, token_map.num_out)
    for written, made in zip(token_map.views(), again.views(), strict=True):
        assert torch.equal(written, made)


@pytest.mark.slow
def test_two_runs_are_equal_bit_by_bit(device):
    metric = torch.randn(4, 577, 64, device=device)
    first, second = (tk.bipartite_match(metric, 100, class_token=True) for _ in range(2))
    assert torch.equal(first.dest, second.dest)
    assert torch.equal(first.members, second.members)


def test_threads_do_not_change_the_result():
    metric = torch.randn(1, 1000, 64)
    threads = torch.get_num_threads()
    maps = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        maps.append(tk.bipartite_match(metric, 300).dest)
    torch.set_num_threads(threads)
    assert torch.equal(maps[0], maps[1])
    assert torch.equal(maps[0], maps[2])


def test_leaves_no_gradient(device):
    metric = torch.randn(2, 9, 4, device=device, requires_grad=True)
    assert not tk.bipartite_match(metric, 2).dest.requires_grad


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda m: tk.bipartite_match(m[0], 1), ValueError, r"metric must be \(B, N, D\).*\(9, 4\)"),
        (lambda m: tk.bipartite_match(m.int(), 1), TypeError, "metric must be float32.*int32"),
        (lambda m: tk.bipartite_match([1.0], 1), TypeError, "metric must be a torch.Tensor, got list"),
        (lambda m: tk.bipartite_match(m, -1), ValueError, "r must be at least 0, got -1"),
        (lambda m: tk.bipartite_match(m, 1.5), TypeError, "r must be an int, got float"),
        (lambda m: tk.bipartite_match(m, True), TypeError, "r must be an int, got bool"),
        (lambda m: tk.bipartite_match(m, 1, num_prefix=1, class_token=True), ValueError, "num_prefix or class_token"),
        (lambda m: tk.bipartite_match(m, 1, num_prefix=-1), ValueError, "num_prefix must be at least 0, got -1"),
        (lambda m: tk.bipartite_match(m[:, None][:, :0], 1), ValueError, "at least one head"),
        (lambda m: tk.bipartite_match(m[:1, :1].expand(2**16, 2**15, 4), 1), ValueError, "at most 2147479552 tokens"),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(2, 9, 4))


MEMORY_CODE = """
import resource, torch, tokred_kernels as tk
metric = torch.randn(1, 12288, 8)
tk.bipartite_match(metric[:, :64], 4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tk.bipartite_match(metric, 1000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_the_score_matrix_is_never_allocated():
    # 6,144 sources times 6,144 destinations are 144 MiB of scores; the metric and the map are under 2 MiB.
    result = subprocess.run([sys.executable, "-c", MEMORY_CODE], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 16
