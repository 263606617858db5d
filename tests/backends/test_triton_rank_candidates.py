# SPDX-License-Identifier: MIT
"""The best match in Triton against the reference; conftest.py says where it runs."""

import math

import pytest
import torch
from support import COSINE_BAND, DTYPES, assert_views, exact_tokens

import tokred_kernels as tk
from tokred_kernels.backends.reference.bipartite_match import bipartite_match as reference_dest
from tokred_kernels.backends.reference.rank_candidates import NO_RANK
from tokred_kernels.ops.bipartite_match import match
from tokred_kernels.ops.rank_candidates import rank_candidates
from tokred_kernels.packing import Packing
from tokred_kernels.partition import every_kth, every_other, prefix_and_rest

# Images without a token, with one, a pair, an odd tail, and more than one block of sources, whose second block is empty
# in all the others.
LENGTHS = (5, 0, 1, 2, 3, 140, 8)


def pair(tokens, prefix):
    """A partition with sources and destinations, whatever is protected; r is not looked at."""
    return every_other(tokens, tokens, prefix, False, False)


def assert_equals_reference(metric, partition, packed=None):
    """Every bit, on the CPU: a GPU's torch may round a norm differently. Returns what Triton gave."""
    starts = None if packed is None else packed.cu_seqlens
    got = rank_candidates(metric, partition, "triton", starts)
    if partition.sources is not None:
        partition = partition._replace(sources=partition.sources.cpu(), destinations=partition.destinations.cpu())
    expected = rank_candidates(metric.cpu(), partition, "reference", None if starts is None else starts.cpu())
    for name, one, other in zip(("score", "partner", "rank"), got, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other), name
    return got


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_images_are_each_alone(device, dtype, prefix):
    packed = Packing.of(LENGTHS, device)
    metric = exact_tokens(packed.rows, 4).to(device, dtype)
    whole = assert_equals_reference(metric, pair(max(LENGTHS), prefix), packed)
    for image, tokens in enumerate(metric.split(LENGTHS)):
        if (alone := pair(len(tokens), prefix)) is None:
            assert (whole[0][image] == -math.inf).all()
            continue
        for of_all, of_one in zip(whole, rank_candidates(tokens[None], alone, "triton"), strict=True):
            assert torch.equal(of_all[image, : alone.num_src], of_one[0])
        assert (whole[2][image, alone.num_src :] == NO_RANK).all()


# Channels: less than a product's least, one block of each config, more than one.
@pytest.mark.parametrize("channels", [1, 33, 64, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_scores_are_cosines(device, channels, dtype):
    packed = Packing.of((3, 21, 0, 70), device)
    # Rows apart in memory, and with an odd stride.
    metric = torch.randn(packed.rows, 2, channels, device=device).to(dtype)[:, 1]
    score, partner, rank = rank_candidates(metric, pair(70, 2), "triton", packed.cu_seqlens)
    for image, tokens in enumerate(metric.double().split(packed.lengths)):
        unit = torch.nn.functional.normalize(tokens, dim=1)
        cosine = unit[2::2] @ unit[3::2].T
        own = cosine.shape[0]
        if cosine.shape[1] == 0:
            assert (score[image] == -math.inf).all()
            continue
        found = slice(1, 1 + own)
        taken = cosine.gather(1, partner[image, found, None].long() - 1)[:, 0]
        assert (taken >= cosine.max(1).values - COSINE_BAND).all()
        assert (score[image, found] - taken).abs().max() <= COSINE_BAND
        order = score[image, found].argsort(descending=True, stable=True)
        assert torch.equal(rank[image, found][order], torch.arange(own, device=device).int())


def test_reads_columns_that_are_apart(device):
    packed = Packing.of((4, 7), device)
    metric = exact_tokens(11, 16).to(device)
    wide = torch.stack([metric, -metric], 2).flatten(1)[:, ::2]
    assert torch.equal(wide, metric)
    assert not wide.is_contiguous()
    assert_equals_reference(wide, pair(7, 0), packed)


def test_ranks_in_more_than_one_block(device):
    # More sources than a program ranks, most of them tied with others.
    packed = Packing.of((5, 300), device)
    _, _, rank = assert_equals_reference(exact_tokens(305, 4, zeros=0.3).to(device), pair(300, 1), packed)
    assert rank[1, 1:].sort().values.tolist() == list(range(149))


def test_what_is_not_finite_is_last_and_nobodys_partner(device):
    packed = Packing.of((9, 3, 8), device)
    metric = exact_tokens(20, 4, zeros=0).to(device)
    metric[[2, 6]] = math.nan  # sources 1 and 3 of the first image
    metric[5, 1] = math.inf  # its destination 2
    metric[9:12] = math.nan  # all of the second
    metric[14] = math.inf  # source 1 of the third
    score, partner, rank = assert_equals_reference(metric, pair(9, 0), packed)
    assert (score[0, [1, 3]] == -math.inf).all()
    assert rank[0, [1, 3]].tolist() == [3, 4]
    assert not (partner[0] == 2).any()
    assert rank[1].tolist() == [0, 1, NO_RANK, NO_RANK, NO_RANK]
    assert rank[2, 1] == 3


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 1), (1, 1)])
def test_packed_images_without_a_pair(device, lengths):
    packed = Packing.of(lengths, device)
    # As the longest image of another call would have it: of three tokens.
    score, _, rank = assert_equals_reference(torch.ones(packed.rows, 4, device=device), pair(3, 0), packed)
    assert score.shape == (len(lengths), 2)
    assert (score == -math.inf).all()
    for length, ranks in zip(lengths, rank.tolist(), strict=True):
        assert ranks == [0 if i < length else NO_RANK for i in range(2)]


PARTITIONS = {
    "class token": every_other(19, 19, None, True, False),
    "distillation token": every_other(19, 19, None, False, True),
    "prefix of 5": pair(19, 5),
    "every 3rd": every_kth(19, 3, 2),
    "importance": prefix_and_rest(19, 12, 2),
    "importance of few": prefix_and_rest(19, 2, 1),
}


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_partition_and_heads(device, name, dtype):
    metric = exact_tokens(2, 19, 16).to(device, dtype)
    metric[1, 11] = math.nan
    assert_equals_reference(metric, PARTITIONS[name])
    # Heads that are alike, so that their mean has no rounding either.
    assert_equals_reference(metric[:, None].expand(2, 3, 19, 16), PARTITIONS[name])


def test_lists(device):
    order = torch.stack([torch.randperm(19) for _ in range(2)]).int().to(device)
    partition = prefix_and_rest(19, 6, 0)._replace(
        sources=order[:, 6:].contiguous(), destinations=order[:, :6].contiguous()
    )
    assert_equals_reference(exact_tokens(2, 19, 16).to(device), partition)


def test_no_images_and_no_channels(device):
    partition = pair(6, 0)
    assert [part.shape for part in rank_candidates(torch.randn(0, 6, 4, device=device), partition, "triton")] == [
        (0, 3)
    ] * 3
    for metric in (torch.randn(2, 6, 0, device=device), torch.randn(2, 3, 6, 0, device=device)):
        score, partner, rank = rank_candidates(metric, partition, "triton")
        assert (score == 0).all()
        assert (partner == 0).all()
        assert rank.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("block", [128, None], ids=["one program", "by ranks"])
@pytest.mark.parametrize("tokens,kept,first", [(19, 12, 2), (19, 5, 0), (6, 1, 0), (6, 5, 4)])
def test_map_where_destinations_come_first(device, tokens, kept, first, block, monkeypatch):
    from tokred_kernels.backends.triton import bipartite_match as module
    from tokred_kernels.backends.triton.configs import SELECT_CONFIGS

    monkeypatch.setattr(module, "select_config", lambda *_: SELECT_CONFIGS.get(block))
    metric = exact_tokens(2, tokens, 16).to(device)
    for r in {1, (tokens - kept) // 2, tokens - kept} - {0}:
        partition = prefix_and_rest(tokens, kept, first)._replace(r=r)
        got = match(metric, partition)
        assert torch.equal(got.dest.cpu(), reference_dest(metric.cpu(), partition))
        assert_views(got)


def test_rows_further_apart_than_32_bits_count(device):
    # Only the rows themselves are ever touched, of memory that is never all there.
    apart = 2**30 + 8
    memory = torch.empty(3 * apart + 4, dtype=torch.float16, device=device)
    metric = memory.as_strided((4, 4), (apart, 1))
    metric.copy_(torch.eye(4)[[0, 1, 2, 2]])
    score, partner, _ = rank_candidates(metric[None], prefix_and_rest(4, 3, 0), "triton")
    assert (score.tolist(), partner.tolist()) == ([[1.0]], [[2]])
    score, partner, _ = rank_candidates(metric, pair(2, 0), "triton", torch.tensor([0, 2, 4], device=device).int())
    assert (score.tolist(), partner.tolist()) == ([[0.0], [1.0]], [[0], [0]])


def test_selectors_go_on_where_triton_has_no_kernel(device):
    # The scores are Triton's; the best backend that is there makes the map of them.
    def selected(metric):
        first = tk.adaptive_bipartite_match(metric, threshold=0.5, num_prefix=1, count="image")
        packed = tk.merge(metric, first, reduce="amax")
        second = tk.adaptive_bipartite_match(packed, threshold=0.25, num_prefix=1, count="image", packed=first.packed)
        return (first, second, *tk.importance_match(metric, 9, class_token=True))

    metric = exact_tokens(3, 17, 16)
    *maps, score = selected(metric.to(device))
    with tk.use_backend("reference"):
        *expected, scores = selected(metric)
    assert torch.equal(score.cpu(), scores)
    for got, want in zip(maps, expected, strict=True):
        assert got.num_out == want.num_out
        assert torch.equal(got.dest.cpu(), want.dest)
        assert_views(got)
