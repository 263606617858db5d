# SPDX-License-Identifier: MIT
"""Compare the Triton kernels that make maps with the reference and the C++ kernels; see conftest.py for the devices."""

import math
import re
from pathlib import Path

import pytest
import torch

import tokred_kernels as tk
from tokred_kernels import Packing, backends
from tokred_kernels.backends.reference.rank_candidates import NO_RANK
from tokred_kernels.partition import Partition, every_kth, every_other, prefix_and_rest
from tokred_kernels.windows import Windows


def on_cpu(value):
    return value.cpu() if isinstance(value, torch.Tensor) else value


def assert_equals_others(op, *arguments):
    """Return the results of the Triton kernels; assert that the reference and the C++ kernels return the same."""
    got = backends.implementation("triton", op)(*arguments)
    results = got if isinstance(got, tuple) else (got,)
    arguments = [
        a._replace(sources=on_cpu(a.sources), destinations=on_cpu(a.destinations))
        if isinstance(a, Partition)
        else on_cpu(a)
        for a in arguments
    ]
    for other in ("reference", "cpu"):
        if backends.can_run(op, other, "cpu", torch.float32) is None:
            dense = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments]
            expected = backends.implementation(other, op)(*dense)
            expected = expected if isinstance(expected, tuple) else (expected,)
            for ours, theirs in zip(results, expected, strict=True):
                assert ours.dtype == theirs.dtype == torch.int32
                assert ours.shape == theirs.shape
                assert torch.equal(ours.cpu(), theirs), other
    return got


@pytest.fixture
def large_blocks(monkeypatch):
    """Large blocks, because the interpreter takes about as long for a large tile as for a small one."""
    from tokred_kernels.backends.triton import rank_candidates, to_csr
    from tokred_kernels.backends.triton.configs import SelectConfig

    for module in (rank_candidates, to_csr):
        monkeypatch.setattr(module, "RANK_CONFIG", SelectConfig(1024, 256, 4))


@pytest.fixture
def small_scans(monkeypatch):
    """Blocks so small that a scan over one image takes several."""
    from tokred_kernels.backends.triton import build_match_map, count_above_threshold, window_map
    from tokred_kernels.backends.triton.configs import SelectConfig

    for module in (build_match_map, count_above_threshold, window_map):
        monkeypatch.setattr(module, "SCAN_CONFIG", SelectConfig(32, 8, 1))


@pytest.fixture(params=["counted", "sorted"])
def sorting(request, monkeypatch):
    """Both ways to collect members, at any size."""
    from tokred_kernels.backends.triton import to_csr

    if request.param == "sorted":
        monkeypatch.setattr(to_csr, "COUNTED_PAIRS", -1)


def test_every_op_has_a_triton_kernel_of_its_own():
    folder = Path(backends.__file__).parent / "triton"
    assert set(backends.OPS) <= {path.stem for path in folder.glob("*.py")}
    for path in folder.glob("*.py"):
        imported = re.findall(r"from tokred_kernels.backends.reference\S* import (.*)", path.read_text())
        assert ", ".join(imported).isupper() or not imported, f"{path} must import only constants from the reference"


# Sizes around a block and a chunk; many tokens in few slots, empty slots, and more slots than tokens.
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 16, 127, 128, 129, 300])
@pytest.mark.parametrize("num_out", [1, 3, 128, 257])
def test_to_csr(device, sorting, tokens, num_out):
    dest = torch.randint(-1, num_out, (3, tokens), dtype=torch.int32, device=device)
    if tokens:
        dest[1] = num_out - 1  # all in one slot, the others empty
        dest[2] = -1  # all dropped
    assert_equals_others("to_csr", dest, num_out)
    assert_equals_others("to_csr", dest[:1], num_out)


def test_to_csr_of_thousands(device, sorting, large_blocks):
    dest = torch.randint(-1, 3000, (1, 5000), dtype=torch.int32, device=device)
    dest[0, 1000:3000] = 17
    assert_equals_others("to_csr", dest, 3000)


def test_large_maps_are_sorted(device, large_blocks):
    from tokred_kernels.backends.triton.to_csr import COUNTED_PAIRS

    tokens, num_out = 20_000, 10_000
    assert tokens * (tokens + num_out) > COUNTED_PAIRS
    assert_equals_others("to_csr", torch.randint(-1, num_out, (1, tokens), dtype=torch.int32, device=device), num_out)


def test_to_csr_reads_strided_maps_and_nothing(device, sorting):
    dest = torch.randint(-1, 9, (40, 2), dtype=torch.int32, device=device).t()
    assert_equals_others("to_csr", dest, 9)
    assert_equals_others("to_csr", torch.full((2, 40), -1, dtype=torch.int32, device=device), 0)
    assert_equals_others("to_csr", torch.empty(0, 5, dtype=torch.int32, device=device), 3)
    assert_equals_others("to_csr", torch.empty(2, 0, dtype=torch.int32, device=device), 0)


@pytest.mark.parametrize("tokens,middle", [(0, 4), (1, 1), (3, 2), (1025, 700)])
def test_compose(device, tokens, middle):
    first = torch.randint(-1, middle, (3, tokens), dtype=torch.int32, device=device)
    second = torch.randint(-1, 50, (3, middle), dtype=torch.int32, device=device)
    assert_equals_others("compose", first, second)
    assert_equals_others("compose", first.t().contiguous().t(), second.t().contiguous().t())
    nothing = torch.full_like(first, -1)
    assert (assert_equals_others("compose", nothing, second[:, :0]) == -1).all()
    assert_equals_others("compose", first[:0], second[:0])


PARTITIONS = {
    "even and odd": lambda n: every_other(n, n, 0, False, False),
    "class token": lambda n: every_other(n, n, None, True, False),
    "distillation token": lambda n: every_other(n, n, None, False, True),
    "prefix of 5": lambda n: every_other(n, n, 5, False, False),
    "every 3rd": lambda n: every_kth(n, 3, 2),
    "importance": lambda n: prefix_and_rest(n, n - n // 3, 1),
}


def random_ranks(images, partition, device):
    """Partners and ranks as `rank_candidates` returns them; all sources of the last image have the same partner."""
    partner = torch.randint(partition.protected_dst, partition.num_dst, (images, partition.num_src))
    partner[-1] = partition.num_dst - 1
    lead = partition.protected_src
    order = torch.stack([torch.randperm(partition.num_src - lead) for _ in range(images)])
    rank = torch.cat([torch.full((images, lead), NO_RANK), order], 1)
    return partner.int().to(device), rank.int().to(device)


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("tokens", [8, 13, 198])
def test_build_match_map(device, sorting, name, tokens):
    partition = PARTITIONS[name](tokens)
    partner, rank = random_ranks(2, partition, device)
    most = partition.num_src - partition.protected_src
    for r in {most // 2, most} if tokens > 100 else sorted({0, 1, most // 2, most - 1, most}):
        assert_equals_others("build_match_map", partner, rank, partition._replace(r=r), tokens)


@pytest.mark.parametrize("name", ["class token", "every 3rd"])  # unmerged sources by index, and by rank
def test_build_match_map_of_more_sources_than_a_block(device, name, small_scans):
    partition = PARTITIONS[name](300)
    assert_equals_others("build_match_map", *random_ranks(2, partition, device), partition._replace(r=70), 300)


@pytest.mark.parametrize("left_out", [0, 7])
def test_build_match_map_of_lists(device, sorting, left_out):
    order = torch.stack([torch.randperm(60) for _ in range(3)]).int().to(device)
    for by_index in (False, True):
        lists = order[:, left_out:30].contiguous(), order[:, 30:].contiguous()
        partition = Partition(0, 1, 30 - left_out, 30, 0, 0, by_index, 0, *lists)
        partner, rank = random_ranks(3, partition, device)
        for r in (0, 1, 15, 30 - left_out):
            assert_equals_others("build_match_map", partner, rank, partition._replace(r=r), 60)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("lengths", [(13, 13, 13), (8, 0, 13, 1, 2, 3), (0, 301, 40, 1), (0,)], ids=str)
def test_build_match_map_of_packed_images(device, sorting, lengths, prefix):
    partition = Partition(0, 2, 0, 0, (prefix + 1) // 2, prefix // 2, prefix > 0, 0).of_tokens(max(lengths))
    partner = torch.zeros(len(lengths), partition.num_src, dtype=torch.int32)
    rank, most = torch.full_like(partner, NO_RANK), []
    for image, length in enumerate(lengths):
        own = partition.of_tokens(length)
        most.append(max(own.num_src - own.protected_src, 0) if own.num_dst > own.protected_dst else 0)
        if most[-1]:
            partner[image, : own.num_src], rank[image, : own.num_src] = (t[0] for t in random_ranks(1, own, "cpu"))
    partner, rank, most = partner.to(device), rank.to(device), torch.tensor(most, dtype=torch.int32)
    for counts in (torch.zeros_like(most), most, most // 2):
        left = torch.tensor(lengths) - counts
        out = Packing.of(tuple(left.tolist()), torch.device(device)).cu_seqlens
        arguments = counts.to(device), Packing.of(lengths, torch.device(device)).cu_seqlens, out, int(left.sum())
        assert_equals_others("build_match_map", partner, rank, partition, sum(lengths), *arguments)
        if len(set(lengths)) == 1 and lengths[0]:
            arguments = arguments[0], None, *arguments[2:]
            assert_equals_others("build_match_map", partner, rank, partition, lengths[0], *arguments)


def test_maps_of_no_images(device):
    nothing = torch.empty(0, 3, dtype=torch.int32, device=device)
    assert_equals_others("build_match_map", nothing, nothing, every_other(6, 3, 0, False, False), 6)
    score, windows = torch.empty(0, 4, device=device), Windows(1, 4, 4, 2, 2)
    assert_equals_others("window_map", score, windows, 2)
    counts, starts = nothing[:, 0], torch.zeros(1, dtype=torch.int32, device=device)
    assert_equals_others("window_map", score, windows, 0, counts, starts, 0)


WINDOWS = [
    Windows(0, 1, 2, 1, 2),
    Windows(2, 6, 5, 2, 1),
    Windows(5, 7, 9, 2, 2),
    Windows(1, 5, 3, 5, 3),
    Windows(1, 20, 15, 1, 2),
]


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
def test_window_map(device, windows, small_scans):
    number, size = windows.number(), windows.size()
    score = torch.randint(-2, 3, (3, number), device=device) / 2  # most of them tie
    score[torch.rand(score.shape) < 0.1] = -math.inf
    score[0, ::2], score[1, ::2] = 0.0, -0.0
    for r in sorted({0, 1, number // 3, number}):
        assert_equals_others("window_map", score, windows, r)
    counts = torch.tensor([number // 2, 0, number], dtype=torch.int32)
    left = windows.num_tokens() - counts * (size - 1)
    starts = Packing.of(tuple(left.tolist()), torch.device(device)).cu_seqlens
    assert_equals_others("window_map", score, windows, 0, counts.to(device), starts, int(left.sum()))
    apart = score.t().contiguous().t()
    assert_equals_others("window_map", apart, windows, number // 2)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 98, 5000])
def test_count_above_threshold(device, size):
    score = torch.randn(5, size, device=device)
    score[:, 4::5] = -math.inf
    score[1] = score[1].round()
    score[2, 1:] = -math.inf  # one score at most
    score[3] = 0.1  # all equal
    for threshold in (-1e300, -1.0, 0.1, 0.5, 1e300, -math.inf, math.inf):
        assert_equals_others("count_above_threshold", score, threshold, 0.0, False)
    for own in (False, True):
        for divisor in (1.0, 11.5, 1e-9, 1e9):
            assert_equals_others("count_above_threshold", score, 0.0, divisor, own)
            assert_equals_others("count_above_threshold", score[[0, 1, 3]], 0.0, divisor, own)


def test_count_above_threshold_of_scores_that_float32_cannot_tell_apart(device):
    score = (1 - torch.arange(1000, device=device)[None] * 2.0**-24).expand(2, -1)
    for own in (False, True):
        assert assert_equals_others("count_above_threshold", score, 0.0, 1.0, own).tolist() == [211, 211]


def test_count_above_threshold_divides_by_a_float64(device):
    divisor, rounded = 0.1, torch.tensor(0.1).double()
    score = torch.randn(1, 1000)
    score[0, 0] = 0.0
    for _ in range(50):  # move the threshold to 0, where float32 has values between it and the rounded threshold
        score[:, 1:] -= score.double().mean() + score.double().std() / divisor
    for _ in range(50):
        mean, std = score.double().mean(), score.double().std()
        score[0, 0] = mean + std * (1 / divisor + 1 / rounded) / 2
    assert mean + std / rounded < score[0, 0].double() < mean + std / divisor
    assert_equals_others("count_above_threshold", score.to(device), 0.0, divisor, True)


def test_count_above_threshold_of_more_images_than_a_block_and_of_none(device, small_scans):
    score = torch.randn(70, 80, device=device)
    assert_equals_others("count_above_threshold", score, 0.0, 2.0, False)
    assert_equals_others("count_above_threshold", score[:0], 0.0, 2.0, False)
    assert_equals_others("count_above_threshold", score.t()[:, ::2], 0.0, 2.0, True)


def test_a_whole_match_above_the_limit_of_one_program(device, large_blocks):
    # Coordinates of -1, 0, 1 in 4 dimensions: cosines are exact, and most of them tie.
    metric = torch.randint(-1, 2, (1, 2100, 4), device=device).to(torch.float16)
    got = tk.bipartite_match(metric, 700, num_prefix=1)
    with tk.use_backend("reference"):
        expected = tk.bipartite_match(metric, 700, num_prefix=1)
    assert torch.equal(got.dest, expected.dest)
    for ours, theirs in zip(got.views(), expected.views(), strict=True):
        assert torch.equal(ours, theirs)
