# SPDX-License-Identifier: MIT
"""The CUDA kernels that make maps without data, run on the host, against the reference backend."""

import pytest
import torch
from emulated import assert_map, poisoned, starts

from tokred_kernels.backends.reference import build_match_map, compose, count_above_threshold
from tokred_kernels.backends.reference.rank_candidates import NO_RANK
from tokred_kernels.partition import Partition, every_kth, every_other, prefix_and_rest


# A test of the maps: empty slots, dropped tokens, one long slot; sizes around a warp and a block, and around the slots
# of a block.
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 1023, 1024, 1025, 4100])
@pytest.mark.parametrize("num_out", [1, 3, 255, 256, 257, 1300])
def test_to_csr(emulator, tokens, num_out):
    dest = torch.randint(-1, num_out, (3, tokens), dtype=torch.int32)
    outputs = [torch.full((size,), -7, dtype=torch.int32) for size in (3 * tokens, 3 * num_out, 3 * num_out)]
    emulator.call("to_csr", (3, tokens, num_out), [dest.flatten().clone(), *outputs], reverse=tokens % 2 == 1)
    assert_map((dest, *outputs), dest, num_out)


def test_to_csr_without_tokens(emulator):
    outputs = [torch.full((size,), -7, dtype=torch.int32) for size in (0, 6, 6)]
    emulator.call("to_csr", (2, 0, 3), [torch.zeros(0, dtype=torch.int32), *outputs])
    assert outputs[2].tolist() == [0] * 6


def test_compose(emulator):
    first = torch.randint(-1, 40, (3, 100), dtype=torch.int32)
    second = torch.randint(-1, 9, (3, 40), dtype=torch.int32)
    dest = torch.full((300,), -7, dtype=torch.int32)
    emulator.call("compose", (3, 100, 40), [first.flatten().clone(), second.flatten().clone(), dest])
    assert torch.equal(dest.view(3, 100), compose.compose(first, second))


def test_keys_are_in_the_order_of_scores(emulator):
    values = torch.tensor([-torch.inf, -1.0, -1e-30, -1e-45, -0.0, 0.0, 1e-45, 0.5, 1.0, torch.inf])
    result = torch.tensor(emulator.call("order", [len(values)], [values])).view(-1, 2)
    keys, indices = result[:, 0], result[:, 1]
    assert keys[4] == keys[5]
    assert (keys[1:4] > keys[:3]).all() and (keys[6:] > keys[5:-1]).all() and keys[0] > 0
    assert indices.tolist() == list(range(len(values)))


PARTITIONS = {
    "even and odd": lambda n: every_other(n, n, 0, False, False),
    "class token": lambda n: every_other(n, n, None, True, False),
    "distillation token": lambda n: every_other(n, n, None, False, True),
    "prefix of 5": lambda n: every_other(n, n, 5, False, False),
    "every 3rd": lambda n: every_kth(n, 3, 2),
    "importance": lambda n: prefix_and_rest(n, n - n // 3, 1),
}


def random_ranks(images, p):
    """Random ranks, and partners of few tokens, so that slots have many members."""
    end = p.protected_dst + (p.num_dst - p.protected_dst + 3) // 4
    partner = torch.randint(p.protected_dst, end, (images, p.num_src))
    lead = p.protected_src
    order = torch.stack([torch.randperm(p.num_src - lead) for _ in range(images)])
    return partner.int(), torch.cat([torch.full((images, lead), NO_RANK), order], 1).int()


def emulated_map(emulator, partner, rank, p, tokens, counts=None, lengths=None, **options):
    """dest, members, begin, count; `counts` makes the map packed, and `lengths` what goes into it."""
    images = partner.shape[0]
    starts_in = starts_out = None
    rows, slots, num_out = images * tokens, images * p.num_out(), 0
    if lengths is not None:
        rows, starts_in = tokens, starts(lengths)
    if counts is not None:
        left = torch.tensor(lengths if lengths is not None else [tokens] * images) - counts
        starts_out = starts(left.tolist())
        slots = num_out = int(left.sum())
    outputs = poisoned(rows, rows, slots, slots)
    lists = [None if t is None else t.flatten() for t in (p.sources, p.destinations)]
    buffers = [partner.flatten(), rank.flatten(), *lists, counts, starts_in, starts_out, *outputs]
    emulator.call("build_match_map", (images, tokens, num_out, *map(int, p.numbers())), buffers, **options)
    expected = build_match_map.build_match_map(partner, rank, p, tokens, counts, starts_in, starts_out, num_out)
    for name, ours, theirs in zip(("dest", "members", "begin", "count"), outputs, expected, strict=True):
        assert ours.tolist() == theirs.flatten().tolist(), name


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("tokens", [7, 12, 13, 198, 1301])
def test_build_match_map_at_any_r(emulator, name, tokens):
    p = PARTITIONS[name](tokens)
    partner, rank = random_ranks(2, p)
    most = p.num_src - p.protected_src
    for r in sorted({0, 1, most // 2, most}):
        emulated_map(emulator, partner, rank, p._replace(r=r), tokens, reverse=r == 1)


@pytest.mark.parametrize("r", [0, 1, 20, 30])
def test_build_match_map_of_lists(emulator, r):
    order = torch.stack([torch.randperm(50) for _ in range(3)]).int()
    p = Partition(0, 1, 30, 20, 0, 0, r % 2 == 1, r, order[:, :30].contiguous(), order[:, 30:].contiguous())
    emulated_map(emulator, *random_ranks(3, p), p, 50)


def packed_ranks(lengths, prefix):
    """The partition of the longest image, with partners and ranks of all, and how many may join in each."""
    longest = max(lengths)
    p = Partition(0, 2, (longest + 1) // 2, longest // 2, (prefix + 1) // 2, prefix // 2, prefix > 0, 0)
    partner = torch.zeros(len(lengths), p.num_src, dtype=torch.int32)
    rank = torch.full_like(partner, NO_RANK)
    most = []
    for image, length in enumerate(lengths):
        own = p.of_tokens(length)
        most.append(max(own.num_src - own.protected_src, 0) if own.num_dst > own.protected_dst else 0)
        if most[-1]:
            partner[image, : own.num_src], rank[image, : own.num_src] = (t[0] for t in random_ranks(1, own))
    return p, partner, rank, torch.tensor(most, dtype=torch.int32)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("lengths", [(13, 13, 13), (8, 0, 13, 1, 2, 3), (0, 1301, 40, 1), (0,)], ids=str)
def test_build_match_map_of_packed_images(emulator, lengths, prefix):
    p, partner, rank, most = packed_ranks(lengths, prefix)
    for counts in (torch.zeros_like(most), most, most // 2, (torch.rand(len(most)) * (most + 1)).int()):
        if len(set(lengths)) == 1 and lengths[0]:
            emulated_map(emulator, partner, rank, p, lengths[0], counts)
        emulated_map(emulator, partner, rank, p, sum(lengths), counts, lengths, reverse=True)


def test_to_csr_without_slots(emulator):
    outputs = poisoned(80, 0, 0)
    dest = torch.full((80,), -1, dtype=torch.int32)
    emulator.call("to_csr", (2, 40, 0), [dest, *outputs])
    assert outputs[0].tolist() == [-1] * 80


@pytest.mark.parametrize("tokens", [3, 1025, 4096, 16_384])
@pytest.mark.parametrize("images", [1, 2])
def test_build_match_map_of_lists_of_any_size(emulator, images, tokens):
    num_dst = tokens // 4 + 1
    order = torch.stack([torch.randperm(tokens) for _ in range(images)]).int()
    lists = order[:, num_dst:].contiguous(), order[:, :num_dst].contiguous()
    p = Partition(0, 1, tokens - num_dst, num_dst, 0, 0, False, tokens // 2, *lists)
    emulated_map(emulator, *random_ranks(images, p), p, tokens, reverse=images == 2)


# All tokens alike: whoever joins, joins one slot; by blocks that have it whole, and that have none of it.
@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("tokens", [1301, 5003])
def test_build_match_map_with_a_slot_of_thousands(emulator, name, tokens):
    p = PARTITIONS[name](tokens)
    rank = torch.cat([torch.full((p.protected_src,), NO_RANK), torch.arange(p.num_src - p.protected_src)])
    rank = rank.int().expand(2, -1).contiguous()
    partner = torch.full_like(rank, p.protected_dst)
    partner[1] = p.num_dst - 1
    p = p._replace(r=p.num_src - p.protected_src - 1)
    emulated_map(emulator, partner, rank, p, tokens)
    emulated_map(emulator, partner, rank, p, tokens, shared_limit=DEST_OUTSIDE, reverse=True)


# What counts a block's slots takes 32 KB; the slots of all tokens then have no room beside it.
DEST_OUTSIDE = 33_500


def test_build_match_map_of_more_tokens_than_fit_into_shared_memory(emulator):
    p = every_other(1301, 1301, 1, False, False)
    partner, rank = random_ranks(2, p)
    few = DEST_OUTSIDE
    emulated_map(emulator, partner, rank, p._replace(r=100), 1301, shared_limit=few)
    counts = torch.tensor([0, 300], dtype=torch.int32)
    emulated_map(emulator, partner, rank, p._replace(r=0), 1301, counts, shared_limit=few)


def test_build_match_map_of_nothing(emulator):
    p = every_other(6, 6, 0, False, False)
    nothing = torch.empty(0, 3, dtype=torch.int32)
    emulated_map(emulator, nothing, nothing, p, 6)
    emulated_map(emulator, nothing, nothing, p, 6, torch.empty(0, dtype=torch.int32))


def emulated_count(emulator, score, threshold=0.0, divisor=0.0, own=False, **options):
    images, sources = score.shape
    (counts,) = poisoned(images)
    numbers = torch.tensor([threshold, divisor], dtype=torch.float64)
    moments = torch.full((2 * images,), torch.nan, dtype=torch.float64) if divisor else None
    emulator.call(
        "count_above_threshold", (images, sources, own), [score.flatten(), numbers, moments, counts], **options
    )
    return counts


@pytest.mark.parametrize(("images", "sources"), [(1, 1), (3, 2), (2, 98), (5, 257), (2, 3000)])
def test_count_above_threshold(emulator, images, sources):
    score = torch.randn(images, sources)
    score[:, ::5] = -torch.inf
    score[0] = score[0].round()
    for reverse, threshold in enumerate((-torch.inf, -1.0, 0.1, 0.5, torch.inf)):
        expected = count_above_threshold.count_above_threshold(score, threshold, 0.0, False)
        assert torch.equal(emulated_count(emulator, score, threshold, reverse=reverse % 2 == 1), expected)
    for own in (False, True):
        for divisor in (1.0, 3.0, 12.0):
            expected = count_above_threshold.count_above_threshold(score, 0.0, divisor, own)
            assert torch.equal(emulated_count(emulator, score, 0.0, divisor, own), expected)


def test_count_above_threshold_of_more_images_than_a_block_has_threads(emulator):
    score = torch.randn(300, 2)
    expected = count_above_threshold.count_above_threshold(score, 0.0, 2.0, False)
    assert torch.equal(emulated_count(emulator, score, 0.0, 2.0), expected)


def test_a_threshold_is_compared_as_a_float(emulator):
    score = torch.full((1, 4), 0.7)  # a little under the double
    assert emulated_count(emulator, score, 0.7).tolist() == [4]


@pytest.mark.parametrize("present", [0, 1])
def test_fewer_than_two_scores_have_no_threshold(emulator, present):
    score = torch.rand(3, 40)
    score[1, present:] = -torch.inf
    own = emulated_count(emulator, score, 0.0, 2.0, True)
    assert own[1] == 0 and own[0] > 0 and own[2] > 0
    assert emulated_count(emulator, score, 0.0, 2.0, False).tolist() == [0, 0, 0]


def test_count_above_threshold_of_nothing(emulator):
    assert emulated_count(emulator, torch.empty(0, 3), 0.0, 1.0).tolist() == []
    assert emulated_count(emulator, torch.empty(2, 0), 0.5).tolist() == [0, 0]
