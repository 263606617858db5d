# SPDX-License-Identifier: MIT
"""The paths of the CUDA kernels that depend on shared memory, launch sizes and alignment, in the emulator.

Metrics are small integers: their products and norms are exact in float32, so the kernels and the reference compute
equal scores, and many scores tie.
"""

import itertools
from functools import partial

import pytest
import torch
from dense_lookup import check, drawn
from emulated import H100_SHARED, SMALL_SHARED
from support import DTYPES, assert_as_reference, assert_same_map, on_reference, random_map

import tokred_kernels as tk
from tokred_kernels.backends.native import DTYPE_CODE
from tokred_kernels.backends.reference.rank_candidates import NO_RANK
from tokred_kernels.ops.bipartite_match import match
from tokred_kernels.ops.window_similarity import window_similarity
from tokred_kernels.packing import Packing
from tokred_kernels.partition import Partition, every_kth, every_other
from tokred_kernels.windows import Windows

BACKENDS = ("cuda",)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

STREAMING_SHARED = 82_000  # enough to stream any metric; most metrics do not stay in it
NONE, SOURCES, ALL = range(3)  # what stays in shared memory: Resident in match_config.h
DEST_OUTSIDE = 33_500  # the counts of a block's slots take 32 KB; the slots of all tokens do not fit as well
NO_ORDER = 4600  # the order of more than 512 scores does not fit, and is kept in the outputs


@pytest.fixture(params=[H100_SHARED, STREAMING_SHARED], ids=["resident", "streamed"])
def limit(request, emulation):
    emulation.configure(request.param, request.param == STREAMING_SHARED)
    return request.param


def whole_numbers(*shape, dtype=torch.float32, scale=1):
    return (torch.randint(-3, 4, shape) * scale).to(dtype)


def check_match(metric, partition):
    """The scores, partners, ranks and the map equal those of the reference."""
    assert_as_reference("cuda", "rank_candidates", metric, partition)
    assert_same_map(match(metric, partition), on_reference(match, metric, partition))


def random_lists(images, tokens, num_src, r):
    order = torch.stack([torch.randperm(tokens) for _ in range(images)]).int()
    lists = order[:, :num_src].contiguous(), order[:, num_src:].contiguous()
    return Partition(0, 2, num_src, tokens - num_src, 0, 0, False, r, *lists)


# One element, less than a load of 16 bytes, more than one load, a chunk of 128 bytes, several chunks.
@dtypes
@pytest.mark.parametrize("channels,heads", [(1, 1), (7, 1), (33, 3), (64, 1), (200, 1)])
def test_match_in_one_launch(limit, channels, heads, dtype):
    shape = (1, 300, channels) if heads == 1 else (1, heads, 300, channels)
    check_match(whole_numbers(*shape, dtype=dtype, scale=heads), every_other(300, 40, 1, False, False))


@pytest.mark.parametrize(
    "channels,heads,dtype",
    [
        (0, 1, torch.float32),
        (1, 1, torch.float16),
        (33, 2, torch.float32),
        (64, 1, torch.bfloat16),
        (200, 3, torch.float16),
    ],
    ids=str,
)
def test_match_in_three_launches(limit, channels, heads, dtype, emulation):
    partition = random_lists(1, 1101, 300, 90)
    shape = (1, 1101, channels) if heads == 1 else (1, heads, 1101, channels)
    config = emulation.match_config(1, heads, 1101, channels, DTYPE_CODE[dtype], 300, 801, limit)
    assert config[:2] == (False, NONE if channels == 200 and limit == STREAMING_SHARED else SOURCES)
    check_match(whole_numbers(*shape, dtype=dtype, scale=heads), partition)


def test_match_of_long_maps_and_of_many_sources(emulation):
    check_match(whole_numbers(1, 1200, 8), every_kth(1200, 7, 2))
    metric = whole_numbers(1, 1100, 8)
    metric[:, 100:120] = torch.nan
    check_match(metric, every_other(1100, 500, 3, False, False))
    check_match(whole_numbers(1, 13_000, 8), Partition(12_800, 2, 100, 100, 0, 0, True, 60))
    # More sources than are all compared with each other: ties, protected sources, and rows that are NaN.
    metric = whole_numbers(2, 2500, 8, dtype=torch.bfloat16)
    metric[0, 3:6] = 0
    metric[1, 1000:1100] = torch.nan
    check_match(metric, Partition(0, 1, 2400, 100, 3, 2, True, 1700))
    # More sources than shared memory has bins for.
    emulation.configure(STREAMING_SHARED, False)
    check_match(whole_numbers(1, 8610, 4), Partition(0, 1, 8600, 10, 0, 0, False, 9))


def test_rank_candidates_of_many_packed_sources(emulation):
    packed = Packing.of((4200, 0, 3, 40), torch.device("cpu"))
    partition = every_other(4200, 4200, 3, False, False)
    metric = whole_numbers(packed.rows, 4)
    assert_as_reference("cuda", "rank_candidates", metric, partition, packed.cu_seqlens)


def test_an_image_that_is_streamed_alone_is_spread_over_blocks(emulation):
    emulation.configure(H100_SHARED, False)
    code = DTYPE_CODE[torch.float32]
    assert not emulation.match_config(1, 1, 577, 153, code, 289, 288, H100_SHARED)[0]
    check_match(whole_numbers(1, 577, 153), every_other(577, 100, 1, False, False))


# Two tiles of sources and destinations, and three; a mean of heads; then images that stay in shared memory or stream
# few bytes.
@pytest.mark.parametrize(
    "sizes,fused",
    [
        *(((2, 1, 1024, 640), False), ((66, 1, 577, 1024), False), ((67, 1, 577, 1024), True)),
        *(((8, 1, 593, 384), False), ((1, 4, 300, 448), False)),
        *(((1, 16, 577, 64), True), ((1, 1, 197, 1280), True), ((1, 1, 300, 448), True)),
    ],
)
def test_few_images_that_are_streamed_take_several_blocks_each(emulation, sizes, fused):
    tokens = sizes[2]
    code = DTYPE_CODE[torch.bfloat16]
    got, resident, *_ = emulation.match_config(*sizes, code, tokens - tokens // 2, tokens // 2, H100_SHARED)
    assert got == fused and (resident == ALL) == (sizes[1] == 16)


def test_every_match_fits_into_shared_memory(emulation):
    limits, sizes = (SMALL_SHARED, 163 * 1024, H100_SHARED), (1, 197, 577, 1024, 1088, 1089, 4096, 65_536)
    for limit, tokens, channels, code in itertools.product(limits, sizes, (1, 64, 80, 384, 1280), DTYPE_CODE.values()):
        # As many images as use one block each.
        problem = 67, 1, tokens, channels, code, tokens - tokens // 2, tokens // 2
        fused, resident, shared, splits, workspace = emulation.match_config(*problem, limit)
        assert shared <= limit
        assert fused == (tokens <= 1088) == (workspace == 0)
        assert splits >= 1 and resident != (SOURCES if fused else ALL)


def test_keys_are_in_the_order_of_scores(emulation):
    scores = [-torch.inf, -1.0, -1e-30, -1e-45, -0.0, 0.0, 1e-45, 0.5, 1.0, torch.inf]
    keys, whole = zip(*emulation.ordered_keys(scores), strict=True)
    assert all(whole) and keys[0] > 0
    assert keys[4] == keys[5]
    assert sorted(set(keys)) == [*keys[:4], *keys[5:]]


@pytest.mark.parametrize("tokens", [1301, 5003])
@pytest.mark.parametrize("shared", [H100_SHARED, DEST_OUTSIDE])
def test_build_match_map_of_large_slots(emulation, shared, tokens):
    emulation.configure(shared, shared == DEST_OUTSIDE)
    for partition in (every_other(tokens, tokens, 5, False, False), every_kth(tokens, 3, 2)):
        sources = partition.num_src - partition.protected_src
        order = torch.cat([torch.full((partition.protected_src,), NO_RANK), torch.randperm(sources)])
        rank = order.int().expand(2, -1).contiguous()
        partner = torch.full_like(rank, partition.protected_dst)  # all sources of an image join one slot
        partner[1] = partition.num_dst - 1
        for r in (100, sources - 1):
            assert_as_reference("cuda", "build_match_map", partner, rank, partition._replace(r=r), tokens)
        if partition.protected_src:  # packed maps are of even and odd tokens
            packed = Packing.of((tokens, tokens - 300), torch.device("cpu"))
            counts = torch.tensor([0, 300], dtype=torch.int32), None, packed.cu_seqlens, packed.rows
            assert_as_reference("cuda", "build_match_map", partner, rank, partition, tokens, *counts)


@pytest.mark.parametrize("shared", [SMALL_SHARED, NO_ORDER])
@pytest.mark.parametrize("tokens", [513, 700, 1500])
def test_keep_topk_sorts_more_scores_than_it_counts(emulation, shared, tokens):
    emulation.configure(shared, shared == NO_ORDER)
    scores = torch.randint(-3, 4, (2, tokens)) / 2
    scores[1, ::5] = torch.nan
    for k in (1, 17, tokens - 3):
        for fuse in (False, True):
            call = partial(tk.keep_topk, scores, k, num_prefix=2, fuse=fuse)
            assert_same_map(call(), on_reference(call))


@pytest.mark.parametrize("number", [3, 14, 16, 18, 66, 1024])
@pytest.mark.parametrize("in_shared", [True, False])
def test_window_map_orders_any_number_of_windows(emulation, number, in_shared):
    windows = Windows(1, 1, 2 * number, 1, 2)
    emulation.configure(SMALL_SHARED if in_shared else 8 * number + 255, in_shared)
    score = torch.randint(0, number // 2 + 1, (2, number)).float()
    for r in (number // 3, number):
        assert_as_reference("cuda", "window_map", score, windows, r)


# A window's sectors for all lanes, and more units than a block has threads.
@pytest.mark.parametrize(
    "channels,dtype", [(768, torch.bfloat16), (600, torch.float32), (1537, torch.float16)], ids=str
)
def test_window_similarity_of_many_channels_and_windows(emulation, channels, dtype):
    for windows, width in (
        (Windows(1, 4, 6, 2, 2), channels),
        (Windows(0, 7, 9, 3, 3), channels),
        (Windows(1, 40, 30, 2, 2), 8),
    ):
        x = torch.randn(1, windows.num_tokens(), width).to(dtype)
        score, _ = window_similarity(x, windows, 0.0, "cuda")
        exact, _ = window_similarity(x.double(), windows, 0.0, "reference")
        torch.testing.assert_close(score, exact, rtol=0, atol=4e-6)


def misaligned(tensor, size):
    """The same values, `size` bytes past a multiple of 16, at the end of their memory."""
    start = size // tensor.itemsize
    return torch.cat([tensor.new_zeros(start), tensor.flatten()])[start:].view(tensor.shape)


@pytest.mark.parametrize(
    "dtype,offset", [(torch.bfloat16, 2), (torch.float16, 4), (torch.bfloat16, 8), (torch.float32, 4)], ids=str
)
def test_rows_that_are_not_aligned(emulation, dtype, offset):
    token_map, windows = random_map(2, 33, 20), Windows(1, 4, 8, 2, 2)
    x = misaligned(whole_numbers(2, 33, 64, dtype=dtype), offset)
    assert x.data_ptr() % 16 == offset
    for reduce in ("sum", "amax"):
        assert torch.equal(tk.merge(x, token_map, reduce=reduce), on_reference(tk.merge, x, token_map, reduce=reduce))
    assert torch.equal(tk.unmerge(x[:, :20], token_map), on_reference(tk.unmerge, x[:, :20], token_map))
    check_match(x, every_other(33, 9, 1, False, False))
    scores = window_similarity(x, windows, 0.0, "cuda")
    assert torch.equal(scores[0], window_similarity(x.clone(), windows, 0.0, "cuda")[0])
    call = drawn((1, 2, 5, 40, 16), dtype)
    check(type(call)(*(misaligned(part, offset) for part in call)))


def test_any_order_of_threads_gives_the_same_bits(emulation):
    x, token_map = torch.randn(2, 200, 40), random_map(2, 200, 30)
    call = drawn((1, 2, 17, 33, 40))
    results = []
    for reverse in (False, True):
        emulation.configure(H100_SHARED, reverse)
        results.append((tk.merge(x, token_map), *tk.lookup_gather(*call[:3])))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize(
    "channels,size,alignment,expected",
    [
        *((1024, 2, 0, (16, 128, 5, 8)), (384, 2, 0, (16, 48, 4, 16)), (384, 2, 4, (4, 192, 5, 8))),
        *((33, 2, 0, (2, 33, 4, 16)), (33, 4, 0, (4, 33, 4, 16)), (1, 2, 0, (2, 1, 0, 256))),
        *((8, 2, 0, (16, 1, 0, 256)), (3, 8, 0, (8, 3, 0, 256)), (0, 4, 0, (16, 0, 0, 256))),
    ],
)
def test_rows_are_cut_into_the_widest_vectors(emulation, channels, size, alignment, expected):
    assert emulation.row_config(channels, size, alignment) == expected


@pytest.mark.parametrize(
    "channels,size,alignment,expected",
    [
        *((768, 2, 0, (96, 16, 16, 4, 1)), (1024, 2, 0, (128, 16, 16, 4, 1)), (2048, 2, 0, (256, 32, 8, 7, 1))),
        *((192, 2, 0, (24, 4, 64, 1, 1)), (64, 2, 0, (8, 4, 64, 1, 1)), (64, 2, 8, (8, 4, 64, 1, 0))),
        *((33, 4, 0, (9, 4, 64, 1, 0)), (1, 2, 0, (1, 1, 256, 1, 0)), (0, 4, 0, (0, 1, 256, 1, 1))),
    ],
)
def test_windows_are_divided_between_lanes(emulation, channels, size, alignment, expected):
    assert emulation.window_config((0, 14, 14, 2, 2), channels, size, alignment) == expected


def test_float64_is_rejected_by_name(emulation):
    double = torch.randn(1, 8, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"bipartite_match.*float64"):
        tk.bipartite_match(double, 2)
    with pytest.raises(RuntimeError, match=r"lookup_gather: .* at most 256 channels a head, got 257"):
        wide = torch.randn(1, 1, 2, 257)
        tk.lookup_gather(wide, wide, wide)
