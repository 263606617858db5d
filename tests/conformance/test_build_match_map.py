# SPDX-License-Identifier: MIT
import pytest
import torch
from support import assert_views, dest_of

import tokred_kernels as tk
from tokred_kernels import Packing, backends
from tokred_kernels.backends.reference.rank_candidates import NO_RANK
from tokred_kernels.ops.build_match_map import build_match_map
from tokred_kernels.partition import Partition, every_kth, every_other, prefix_and_rest


def call(partner, rank, partition, tokens, counts=None, packed_in=None):
    """The map, on the backend in use."""
    return build_match_map(
        partner, rank, partition, tokens, backends.choose("rank_candidates", partner.float()), counts, packed_in
    )


def random_ranks(images, partition):
    """Partners and ranks as `rank_candidates` might give them: any partner that may be joined, any order."""
    partner = torch.randint(partition.protected_dst, partition.num_dst, (images, partition.num_src))
    lead = partition.protected_src
    order = torch.stack([torch.randperm(partition.num_src - lead) for _ in range(images)])
    return partner.int(), torch.cat([torch.full((images, lead), NO_RANK), order], 1).int()


def truth(partner, rank, partition, number, r):
    """`dest` of one image: ToMe's concatenation of unmerged sources and destinations."""
    first, stride, lead = partition.first, partition.stride, partition.protected_src
    destinations = [first + j * stride + stride - 1 for j in range(partition.num_dst)]
    sources = sorted(set(range(first, number)).difference(destinations))[: partition.num_src]
    if r == 0:
        return [n if n < first + partition.num_src + partition.num_dst else -1 for n in range(number)]
    partner, rank = partner.tolist(), rank.tolist()
    joined = [i for i in range(partition.num_src) if rank[i] < r]
    free = [i for i in range(lead, partition.num_src) if rank[i] >= r]
    free = [*range(lead), *(free if partition.sources_by_index else sorted(free, key=rank.__getitem__))]
    unmerged = [[sources[i]] for i in free]
    groups = [[d, *(sources[i] for i in joined if partner[i] == j)] for j, d in enumerate(destinations)]
    slots = [[n] for n in range(first)]
    for _ in range(partition.protected_dst):  # each protected destination after the unmerged source of its number
        slots += [*unmerged[:1], *groups[:1]]
        unmerged, groups = unmerged[1:], groups[1:]
    return dest_of([*slots, *unmerged, *groups], number)


PARTITIONS = {
    "even and odd": lambda n: every_other(n, n, 0, False, False),
    "class token": lambda n: every_other(n, n, None, True, False),
    "distillation token": lambda n: every_other(n, n, None, False, True),
    "both": lambda n: every_other(n, n, None, True, True),
    "prefix of 5": lambda n: every_other(n, n, 5, False, False),
    "every 3rd": lambda n: every_kth(n, 3, 2),
    "importance": lambda n: prefix_and_rest(n, n - n // 3, 1),
}


@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("tokens", [7, 12, 13, 198])
def test_is_what_the_definition_says_at_any_r(device, name, tokens):
    partition = PARTITIONS[name](tokens)
    partner, rank = random_ranks(3, partition)
    most = partition.num_src - partition.protected_src
    for r in sorted({0, 1, most // 2, most - 1, most}):
        own = partition._replace(r=r)
        token_map = call(partner.to(device), rank.to(device), own, tokens)
        assert token_map.num_out == own.num_out()
        assert token_map.dest.tolist() == [truth(*image, own, tokens, r) for image in zip(partner, rank, strict=True)]
        assert_views(token_map)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("lengths", [(13, 13, 13, 13), (8, 0, 13, 1)])
def test_packed_images_equal_each_image_alone(device, prefix, lengths):
    partition = every_other(13, 13, prefix, False, False)
    partner, rank = random_ranks(4, partition)
    counts, expected, start = [], [], 0
    for image, length in enumerate(lengths):
        own = partition.of_tokens(length)
        rank[image, own.num_src :] = NO_RANK
        joinable = [i for i in range(own.protected_src, own.num_src) if own.num_dst > own.protected_dst]
        rank[image, : own.num_src] = NO_RANK
        rank[image, joinable] = torch.randperm(len(joinable)).int()
        partner[image].clamp_(max=max(own.num_dst - 1, 0))
        counts.append((0, len(joinable), len(joinable) // 2, min(1, len(joinable)))[image])
        dest = truth(partner[image], rank[image], own._replace(r=counts[-1]), length, counts[-1])
        expected += [slot + start for slot in dest]
        start += length - counts[-1]
    packed_in = None if len(set(lengths)) == 1 else Packing.of(lengths, torch.device(device))
    tokens = 13 if packed_in is None else sum(lengths)
    given = torch.tensor(counts, dtype=torch.int32, device=device)
    token_map = call(partner.to(device), rank.to(device), partition, tokens, given, packed_in)
    assert token_map.dest.flatten().tolist() == expected
    assert token_map.dest.shape == ((4, 13) if packed_in is None else (sum(lengths),))
    assert token_map.num_out == start
    assert token_map.packed.lengths == tuple(n - r for n, r in zip(lengths, counts, strict=True))
    assert token_map.packed.cu_seqlens.dtype == torch.int32
    assert token_map.packed.cu_seqlens.tolist() == [sum(token_map.packed.lengths[:b]) for b in range(5)]
    assert token_map.packed_in is packed_in
    assert_views(token_map)


def test_lists_of_sources_and_destinations(device):
    sources = torch.tensor([[5, 0, 3], [1, 2, 4]], dtype=torch.int32, device=device)
    destinations = torch.tensor([[4, 1, 2], [5, 3, 0]], dtype=torch.int32, device=device)
    partition = Partition(0, 1, 3, 3, 0, 0, False, 2, sources, destinations)
    partner = torch.tensor([[2, 0, 2], [0, 1, 1]], dtype=torch.int32, device=device)
    rank = torch.tensor([[1, 2, 0], [0, 1, 2]], dtype=torch.int32, device=device)
    token_map = call(partner, rank, partition, 6)
    assert token_map.dest.tolist() == [[0, 2, 3, 3, 1, 3], [3, 1, 2, 2, 0, 1]]
    assert_views(token_map)


@pytest.mark.slow
def test_many_images_equal_the_reference(device):
    partition = every_other(198, 60, 1, False, False)
    given = [part.to(device) for part in random_ranks(200, partition)]
    counts = torch.randint(0, 99, (200,), dtype=torch.int32, device=device)
    packed_in = Packing.of((198,) * 200, torch.device(device))
    for how in ((198,), (198, counts), (198 * 200, counts, packed_in)):
        token_map = call(*given, partition, *how)
        with tk.use_backend("reference"):
            expected = call(*given, partition, *how)
        assert torch.equal(token_map.dest, expected.dest)
        assert_views(token_map)


def test_no_images(device):
    partition = every_other(6, 6, 0, False, False)
    nothing = torch.empty(0, 3, dtype=torch.int32, device=device)
    assert call(nothing, nothing, partition, 6).dest.shape == (0, 6)
    token_map = call(nothing, nothing, partition, 6, torch.empty(0, dtype=torch.int32, device=device))
    assert token_map.packed.cu_seqlens.tolist() == [0]
    assert (token_map.dest.shape, token_map.num_out, token_map.batch) == ((0, 6), 0, 0)
