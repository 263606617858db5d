# SPDX-License-Identifier: MIT
import math

import pytest
import torch
from support import COSINE_BAND, DTYPES, cosines, exact_tokens, partners, slow

from tokred_kernels import backends
from tokred_kernels.backends.reference.rank_candidates import NO_RANK
from tokred_kernels.ops.rank_candidates import rank_candidates
from tokred_kernels.packing import Packing
from tokred_kernels.partition import Partition, every_kth, every_other, prefix_and_rest


def call(metric, partition, packed=None):
    """score, partner and rank, on the backend in use."""
    starts = None if packed is None else packed.cu_seqlens
    return rank_candidates(metric, partition, backends.choose("rank_candidates", metric), starts)


def drawn(tokens, sources):
    """A partition by lists: a random split, another one in each of two images."""
    order = torch.stack([torch.randperm(tokens) for _ in range(2)]).int()
    lists = order[:, :sources].contiguous(), order[:, sources:].contiguous()
    return Partition(0, 1, sources, tokens - sources, 0, 0, False, 1, *lists)


def split(partition, image):
    """The tokens that are sources and destinations, from the formulas of csrc/common/args.h."""
    if partition.sources is not None:
        return partition.sources[image].tolist(), partition.destinations[image].tolist()
    first, stride = partition.first, partition.stride
    destinations = [first + j * stride + stride - 1 for j in range(partition.num_dst)]
    if stride == 1:
        return [first + partition.num_dst + i for i in range(partition.num_src)], destinations
    return [first + i + i // (stride - 1) for i in range(partition.num_src)], destinations


def truth(tokens, sources, destinations, protected_src, protected_dst):
    """score, partner and rank of one image (N, D), as lists."""
    open_sources = sources[protected_src:]
    best = partners(cosines(tokens), open_sources, destinations[protected_dst:])
    order = sorted(open_sources, key=lambda s: (-best[s][0], sources.index(s)))
    score = [-math.inf] * protected_src + [best[s][0] for s in open_sources]
    partner = [destinations.index(best[s][1]) for s in open_sources]
    rank = [NO_RANK] * protected_src + [order.index(s) for s in open_sources]
    return score, partner, rank


PARTITIONS = {
    "even and odd": lambda n: every_other(n, n, 0, False, False),
    "class token": lambda n: every_other(n, n, None, True, False),
    "distillation token": lambda n: every_other(n, n, None, False, True),
    "prefix of 5": lambda n: every_other(n, n, 5, False, False),
    "every 3rd": lambda n: every_kth(n, 3, 2),
    "importance": lambda n: prefix_and_rest(n, n - n // 3, 1),
    "lists": lambda n: drawn(n, n - n // 4),
}


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("tokens", [12, 17, *slow(197)])
def test_is_what_the_definition_says(device, name, tokens):
    partition = PARTITIONS[name](tokens)
    metric = exact_tokens(2, tokens, 16)
    metric[1, tokens // 2] = math.nan
    expected = [
        truth(image, *split(partition, b), partition.protected_src, partition.protected_dst)
        for b, image in enumerate(metric)
    ]
    on_device = partition
    if partition.sources is not None:
        lists = partition.sources.to(device), partition.destinations.to(device)
        on_device = partition._replace(sources=lists[0], destinations=lists[1])
    for dtype in DTYPES:
        score, partner, rank = (part.cpu() for part in call(metric.to(device, dtype), on_device))
        assert score.dtype == torch.float32
        assert partner.dtype == rank.dtype == torch.int32
        for image, (scores, indices, ranks) in enumerate(expected):
            assert score[image].tolist() == scores
            assert rank[image].tolist() == ranks
            assert partner[image, partition.protected_src :].tolist() == indices
        assert ((partner >= 0) & (partner < partition.num_dst)).all(), "each is a destination, whether it joins or not"


@pytest.mark.parametrize("tokens,channels", [(2, 1), (3, 3), (31, 64), (131, 130), *slow((197, 385), (1000, 64))])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_scores_equal_float64(device, tokens, channels, dtype):
    metric = torch.randn(2, tokens, channels).to(dtype)
    partition = every_other(tokens, 1, 0, False, False)
    score, partner, rank = (part.cpu() for part in call(metric.to(device), partition))
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    exact = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    taken = exact.gather(2, partner.long()[..., None])[..., 0]
    assert (taken >= exact.max(-1).values - COSINE_BAND).all()
    assert (score - taken).abs().max() <= COSINE_BAND
    assert torch.equal(rank.sort().values, torch.arange(rank.shape[1]).int().expand(2, -1))
    ranked = score.gather(1, rank.argsort())
    assert (ranked.diff() <= 0).all(), "ranks are of the scores that are handed out"


def test_means_of_heads_are_rounded_first(device):
    for dtype in DTYPES:
        # Sums of whole numbers have one mean in float32, whatever their order, and it does not fit half precision.
        keys = torch.randint(-300, 301, (2, 17, 3, 4, 16), device=device).to(dtype)[:, :, 1].transpose(1, 2)
        partition = every_other(17, 1, 1, False, False)
        mean = keys.float().mean(1).to(dtype)
        for got, want in zip(call(keys, partition), call(mean, partition), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=COSINE_BAND)


LENGTHS = (12, 0, 1, 2, 3, 17, 4, 7)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_packed_images_equal_each_image_alone(device, prefix):
    packed = Packing.of(LENGTHS, torch.device(device))
    random, ties = torch.randn(packed.rows, 24).to(device), exact_tokens(packed.rows, 4).to(device)
    for metric in (random, ties, random[:, ::3]):
        longest = every_other(max(LENGTHS), max(LENGTHS), prefix, False, False)
        score, partner, rank = call(metric, longest, packed)
        assert score.shape == partner.shape == rank.shape == (len(LENGTHS), longest.num_src)
        for image, tokens in enumerate(metric.split(LENGTHS)):
            own = every_other(len(tokens), len(tokens), prefix, False, False)
            open_sources = slice(0) if own is None else slice(own.protected_src, own.num_src)
            absent = torch.ones(longest.num_src, dtype=torch.bool)
            absent[open_sources] = False
            joinable = rank[image].cpu() != NO_RANK
            # Without a destination to join, a source may have a rank, but no score that reaches anything.
            if own is not None:
                assert torch.equal(joinable, ~absent)
            assert (score[image].cpu()[absent] == -math.inf).all()
            if own is not None:
                alone = call(tokens[None], own)
                for got, want in zip((score, partner, rank), alone, strict=True):
                    assert torch.equal(got[image, open_sources], want[0, open_sources])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tokens_that_are_not_finite_never_win(device, value):
    metric = -torch.rand(1, 12, 4, device=device)
    metric[:, 1::2] *= -1  # all similarities negative
    metric[0, 2] = value
    metric[0, 3, 1] = value
    score, partner, rank = call(metric, every_other(12, 12, 0, False, False))
    assert score[0, 1] == -math.inf
    assert rank[0, 1] == 5
    assert not (partner == 1).any()
    assert (score[0, [0, 2, 3, 4, 5]] < 0).all()
    assert (score[0, [0, 2, 3, 4, 5]] >= -1 - COSINE_BAND).all()


def test_zero_tokens_have_similarity_zero(device):
    metric = torch.zeros(1, 5, 3, device=device)
    metric[0, 1:3] = torch.tensor([1.0, 2.0, 3.0])
    score, partner, rank = call(metric, every_other(5, 1, 0, False, False))
    assert score[0, [0, 2]].tolist() == [0, 0]
    assert abs(score[0, 1] - 1) <= COSINE_BAND
    assert partner.tolist() == [[0, 0, 0]]
    assert rank.tolist() == [[1, 0, 2]]


def test_reads_strided_and_expanded_metrics(device):
    partition = every_other(14, 1, 1, False, False)
    base = torch.randn(3, 14, 2, 16, device=device)
    images_last = torch.randn(14, 3, 16, device=device).transpose(0, 1)
    for metric in (base[:, :, 1], base[:, :, 0, ::2], base[:1, :, 0].expand(3, 14, 16), images_last):
        for got, want in zip(call(metric, partition), call(metric.contiguous(), partition), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 1), (1, 1)], ids=str)
def test_packed_images_without_a_pair(device, lengths):
    packed = Packing.of(lengths, torch.device(device))
    # The partition of a longer image, of three tokens.
    score, _, rank = call(torch.ones(packed.rows, 4, device=device), every_other(3, 3, 0, False, False), packed)
    assert score.shape == rank.shape == (len(lengths), 2)
    assert (score == -math.inf).all()


@pytest.mark.backends("cpu", "cuda", "triton")
def test_rows_further_apart_than_32_bits_count(device, far_rows):
    metric = far_rows[:4]
    metric.copy_(torch.eye(4)[[0, 1, 2, 2]])
    score, partner, _ = call(metric[None], prefix_and_rest(4, 3, 0))
    assert (score.tolist(), partner.tolist()) == ([[1.0]], [[2]])
    packed = Packing.of((2, 2), torch.device(device))
    score, partner, _ = call(metric, every_other(2, 2, 0, False, False), packed)
    assert (score.tolist(), partner.tolist()) == ([[0.0], [1.0]], [[0], [0]])


# The sums of products of similar tokens are large, and tensor cores truncate each partial sum.
def test_float32_scores_of_many_channels_are_exact(device):
    metric = torch.randn(1, 64, 1280) + 1
    score, partner, _ = call(metric.to(device), every_other(64, 64, 0, False, False))
    unit = torch.nn.functional.normalize(metric[0].double(), dim=-1)
    cosine = (unit[::2] @ unit[1::2].T).gather(1, partner[0].cpu().long()[:, None])[:, 0]
    torch.testing.assert_close(score[0].cpu().double(), cosine, rtol=0, atol=1e-6)


def test_empty_batch_and_no_channels(device):
    partition = every_other(6, 1, 0, False, False)
    assert [tuple(part.shape) for part in call(torch.randn(0, 6, 4, device=device), partition)] == [(0, 3)] * 3
    score, partner, rank = call(torch.randn(1, 6, 0, device=device), partition)
    assert score.tolist() == [[0, 0, 0]]
    assert partner.tolist() == [[0, 0, 0]]
    assert rank.tolist() == [[0, 1, 2]]


@pytest.mark.slow
def test_threads_and_other_images_change_no_bit(device):
    metric = torch.randn(3, 577, 64, device=device)
    partition = every_other(577, 1, 1, False, False)
    threads = torch.get_num_threads()
    runs = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        runs.append(call(metric, partition))
    torch.set_num_threads(threads)
    runs.append([torch.cat(parts) for parts in zip(*(call(image[None], partition) for image in metric), strict=True)])
    for run in runs[1:]:
        for got, want in zip(run, runs[0], strict=True):
            assert torch.equal(got, want)
