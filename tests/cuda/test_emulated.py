# SPDX-License-Identifier: MIT
"""The CUDA kernels' own sources, run on the host (see emulation/), against the reference backend.

Metrics are small whole numbers where indices are compared: their products and norms are exact in float32, so that the
scores are equal to the last bit, and ties are many and real. Merged values are whole numbers for the same reason.
"""

import pytest
import torch

from tokred_kernels.backends.reference import bipartite_match, compose, invert, merge, unmerge
from tokred_kernels.partition import Partition, every_kth, every_other

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
REDUCES = {"sum": 0, "mean": 1, "amax": 2}
H100_SHARED = 227 * 1024  # bytes of shared memory that a block may have
SMALL_SHARED = 99 * 1024  # the same on the architecture with the least
STREAMING_SHARED = 82_000  # enough to stream any metric, too little for most to stay


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


floats = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
all_floats = pytest.mark.parametrize("dtype", list(DTYPES), ids=dtype_id)


def flat(tensor):
    """What lies in memory from a tensor's first element to its last, however it is strided."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((length if tensor.numel() else 0,), (1,)).clone()


def whole_numbers(*size, dtype=torch.float32, low=-3, high=4, scale=1):
    return (torch.randint(low, high, size) * scale).to(dtype)


def match_problem(metric, p):
    images, heads, tokens, channels = metric.shape
    strides = (metric.stride(0), metric.stride(1), metric.stride(2))
    return (*strides, images, heads, tokens, channels, DTYPES[metric.dtype], *map(int, p[:8]))


def emulated_match(emulator, metric, p, **options):
    """dest, members, begin, count of a (B, H, N, D) metric."""
    images, _, tokens, _ = metric.shape
    sizes = (images * tokens, images * tokens, images * p.num_out, images * p.num_out)
    outputs = [torch.full((size,), -7, dtype=torch.int32) for size in sizes]
    lists = [None if t is None else t.contiguous().flatten() for t in (p.sources, p.destinations)]
    emulator.call("bipartite_match", match_problem(metric, p), [flat(metric), *lists, *outputs], **options)
    dest, members, begin, count = outputs
    return dest.view(images, tokens), members, begin.view(images, p.num_out), count.view(images, p.num_out)


def assert_map(got, dest, num_out):
    names = ("dest", "members", "begin", "count")
    for name, ours, expected in zip(names, got, (dest, *invert.invert(dest, num_out)), strict=True):
        assert ours.flatten().tolist() == expected.flatten().tolist(), name


def check_match(emulator, metric, p, **options):
    squeezed = metric[:, 0] if metric.shape[1] == 1 else metric
    expected = bipartite_match.bipartite_match(squeezed, p)
    assert_map(emulated_match(emulator, metric, p, **options), expected, p.num_out)


# Around nothing, one tile (256 tokens) and two; a ViT's own sizes, with and without a distillation token.
@floats
@pytest.mark.parametrize("tokens", [2, 3, 31, 197, 198, 256, 257])
def test_match(emulator, tokens, dtype):
    metric = whole_numbers(2, 1, tokens, 24, dtype=dtype)
    for reverse, r in enumerate((tokens // 8 + 1, tokens // 2)):
        check_match(emulator, metric, every_other(tokens, r, None, False, False), reverse=bool(reverse))


def test_match_of_every_r(emulator):
    metric = whole_numbers(1, 1, 21, 8)
    for r in range(1, 11):
        check_match(emulator, metric, every_other(21, r, None, False, False), reverse=r % 2 == 1)


@floats
@pytest.mark.parametrize("tokens", [577, 1024])
def test_match_of_several_tiles(emulator, tokens, dtype):
    metric = whole_numbers(1, 1, tokens, 16, dtype=dtype)
    check_match(emulator, metric, every_other(tokens, tokens // 8, None, True, False))


# One element, less than a load, just over one, over a chunk; and rows that no load of 16 bytes can read.
@floats
@pytest.mark.parametrize("channels", [1, 7, 33, 64, 200])
@pytest.mark.parametrize("limit", [H100_SHARED, STREAMING_SHARED], ids=["resident", "streamed"])
def test_match_channels(emulator, channels, dtype, limit):
    tokens = 300
    metric = whole_numbers(1, 1, tokens, channels, dtype=dtype)
    check_match(emulator, metric, every_other(tokens, 40, None, False, False), shared_limit=limit)


def test_a_wide_metric_is_streamed_in_one_launch(emulator):
    p = every_other(197, 16, None, True, False)
    metric = whole_numbers(1, 1, 197, 1280, dtype=torch.bfloat16)
    fused, resident, *_ = emulator.call("match_config", (*match_problem(metric, p), H100_SHARED), [None] * 3)
    assert (fused, resident) == (1, 0)
    check_match(emulator, metric, p)


@floats
@pytest.mark.parametrize("heads", [2, 3])
@pytest.mark.parametrize("limit", [H100_SHARED, STREAMING_SHARED], ids=["resident", "streamed"])
def test_match_averages_heads(emulator, heads, dtype, limit):
    metric = whole_numbers(2, heads, 300, 40, dtype=dtype, scale=heads)  # multiples, so that the mean is exact too
    check_match(emulator, metric, every_other(300, 20, None, False, False), shared_limit=limit)


def test_match_rounds_the_mean_over_heads(emulator):
    metric = torch.randn(1, 3, 64, 8).to(torch.bfloat16)
    rounded = metric.float().mean(1).to(torch.bfloat16)
    p = every_other(64, 16, None, False, False)
    averaged = emulated_match(emulator, metric, p)
    assert_map(averaged, emulated_match(emulator, rounded[:, None], p)[0], p.num_out)


@floats
@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5])
def test_match_protects_the_prefix(emulator, prefix, dtype):
    metric = whole_numbers(2, 1, 99, 8, dtype=dtype)
    for r in (1, 99):
        check_match(emulator, metric, every_other(99, r, prefix, False, False))


@pytest.mark.parametrize("distill_token", [False, True])
@pytest.mark.parametrize("class_token", [False, True])
def test_match_protects_class_and_distillation(emulator, class_token, distill_token):
    metric = whole_numbers(2, 1, 198, 8)
    for r in (1, 50, 200):
        check_match(emulator, metric, every_other(198, r, None, class_token, distill_token))


@pytest.mark.parametrize(
    ("tokens", "k", "prefix"), [(1, 1, 0), (7, 2, 0), (50, 3, 1), (64, 8, 0), (10, 1, 2), (5, 9, 0)]
)
def test_match_of_every_kth(emulator, tokens, k, prefix):
    check_match(emulator, whole_numbers(2, 1, tokens, 8), every_kth(tokens, k, prefix))


def random_lists(images, tokens, num_src, r, first=0, by_index=False):
    order = torch.stack([torch.randperm(tokens) for _ in range(images)]).int()
    num_dst = tokens - num_src - first
    lists = (order[:, :num_src].contiguous(), order[:, num_src : num_src + num_dst].contiguous())
    return Partition(first, 2, num_src, num_dst, 0, 0, by_index, r, *lists)


@pytest.mark.parametrize(("num_src", "r"), [(20, 20), (70, 31), (99, 99), (0, 0)])
@pytest.mark.parametrize("by_index", [False, True])
def test_match_of_lists(emulator, num_src, r, by_index):
    p = random_lists(3, 100, num_src, r, by_index=by_index)
    check_match(emulator, whole_numbers(3, 1, 100, 8), p)


def test_match_without_anything_to_join(emulator):
    for tokens in (1, 2):
        p = Partition(0, 2, tokens - tokens // 2, tokens // 2, 0, tokens // 2, False, 0)
        check_match(emulator, whole_numbers(1, 1, tokens, 8), p)
    assert emulated_match(emulator, whole_numbers(0, 1, 4, 8), Partition(0, 2, 2, 2, 0, 0, False, 1))[0].shape == (0, 4)


@floats
def test_match_with_zero_and_nan_rows(emulator, dtype):
    metric = whole_numbers(2, 1, 97, 16, dtype=dtype)
    metric[0, :, 3] = 0
    metric[0, :, 10] = 0
    metric[1, :, 4] = torch.nan
    metric[1, :, 7, 2] = torch.nan
    metric[1, :, 9, 1] = torch.inf
    for r in (1, 30, 48):
        check_match(emulator, metric, every_other(97, r, None, False, False))
    check_match(emulator, torch.full_like(metric, torch.nan), every_other(97, 30, None, True, False))
    check_match(emulator, torch.zeros_like(metric), every_other(97, 30, None, False, False))
    check_match(emulator, torch.ones_like(metric), every_other(97, 30, None, False, True))


@floats
@pytest.mark.parametrize("offset", [0, 4])
def test_match_of_strided_rows(emulator, dtype, offset):
    padded = whole_numbers(2, 50, 2, 40, dtype=dtype)
    metric = padded.transpose(1, 2)[..., : 32 + offset]  # (B, H, N, D), as queries and keys come out of one projection
    check_match(emulator, metric, every_other(50, 9, None, True, False), offset=offset)


# Above the fused sizes: one block of ranks and several, cursors in shared memory and in the result itself.
@pytest.mark.parametrize(
    ("tokens", "by_index", "dtype"),
    [(1101, False, torch.float32), (1101, True, torch.float16), (1300, True, torch.bfloat16)],
    ids=str,
)
def test_match_in_three_launches(emulator, tokens, by_index, dtype):
    metric = whole_numbers(2, 1, tokens, 8, dtype=dtype)
    p = every_other(tokens, tokens // 4, None, by_index, by_index)
    fused, _, _, splits, workspace = emulator.call("match_config", (*match_problem(metric, p), H100_SHARED), [None] * 3)
    assert not fused and splits > 1 and workspace > 0
    check_match(emulator, metric, p)


def test_match_in_three_launches_of_lists_and_long_maps(emulator):
    check_match(emulator, whole_numbers(2, 1, 1200, 8), random_lists(2, 1200, 200, 150))
    check_match(emulator, whole_numbers(1, 1, 1200, 8), every_kth(1200, 7, 2))
    metric = whole_numbers(1, 1, 1100, 8)
    metric[:, :, 100:120] = torch.nan
    check_match(emulator, metric, every_other(1100, 500, 3, False, False))
    # More slots than the shared cursor holds, few of them to be matched.
    check_match(emulator, whole_numbers(1, 1, 13_000, 8), Partition(12_800, 2, 100, 100, 0, 0, True, 60))


@floats
@pytest.mark.parametrize("limit", [H100_SHARED, STREAMING_SHARED], ids=["resident", "streamed"])
def test_match_of_random_metrics_is_right_up_to_near_ties(emulator, dtype, limit):
    tokens, r = 259, 60
    metric = torch.randn(2, 1, tokens, 100).to(dtype)
    p = every_other(tokens, r, None, False, False)
    dest = emulated_match(emulator, metric, p, shared_limit=limit)[0].long()
    a, b = metric[:, 0, ::2].double(), metric[:, 0, 1::2].double()
    scores = torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).transpose(1, 2)
    slack = 4e-6  # float32 sums of 100 products, each operand cut to 22 bits when the metric is float32
    unmerged = p.num_src - r
    for image in range(2):
        slot = dest[image, ::2]
        joins = slot >= unmerged
        assert joins.sum() == r
        best = scores[image].max(1).values
        chosen = scores[image].gather(1, (slot - unmerged).clamp(min=0)[:, None])[:, 0]
        assert (chosen[joins] >= best[joins] - slack).all()
        assert best[joins].min() >= best[~joins].max() - slack
        in_order = best[~joins][slot[~joins].argsort()]
        assert (in_order[:-1] >= in_order[1:] - slack).all()


def test_match_refuses_float64(emulator):
    with pytest.raises(RuntimeError, match="bipartite_match: float64 is not supported on CUDA"):
        emulated_match(emulator, whole_numbers(1, 1, 8, 8, dtype=torch.float64), every_other(8, 2, None, False, False))


def test_match_fits_shared_memory(emulator):
    for limit in (SMALL_SHARED, 163 * 1024, H100_SHARED):
        for tokens in (1, 197, 577, 1024, 1088, 1089, 4096, 65_536):
            for channels in (1, 64, 80, 384, 1280):
                for dtype in DTYPES.values():
                    p = (0, 2, tokens - tokens // 2, tokens // 2, 0, 0, 0, tokens // 4)
                    problem = (0, 0, channels, 8, 1, tokens, channels, dtype, *p)
                    fused, resident, shared, splits, workspace = emulator.call(
                        "match_config", (*problem, limit), [None] * 3
                    )
                    assert shared <= limit
                    assert fused == (tokens <= 1088)
                    assert (workspace == 0) == bool(fused)
                    assert splits >= 1 and (fused or not resident)


# A test of the maps: empty slots, dropped tokens, one long slot; sizes around a warp, a block and the shared cursor.
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 511, 512, 513, 1200])
@pytest.mark.parametrize("num_out", [1, 3, 700, 13_000])
def test_invert(emulator, tokens, num_out):
    dest = torch.randint(-1, num_out, (3, tokens), dtype=torch.int32)
    outputs = [torch.full((size,), -7, dtype=torch.int32) for size in (3 * tokens, 3 * num_out, 3 * num_out)]
    emulator.call("invert", (3, tokens, num_out), [dest.flatten().clone(), *outputs], reverse=tokens % 2 == 1)
    assert_map((dest, *outputs), dest, num_out)


def test_invert_without_tokens(emulator):
    outputs = [torch.full((size,), -7, dtype=torch.int32) for size in (0, 6, 6)]
    emulator.call("invert", (2, 0, 3), [torch.zeros(0, dtype=torch.int32), *outputs])
    assert outputs[2].tolist() == [0] * 6


def test_compose(emulator):
    first = torch.randint(-1, 40, (3, 100), dtype=torch.int32)
    second = torch.randint(-1, 9, (3, 40), dtype=torch.int32)
    dest = torch.full((300,), -7, dtype=torch.int32)
    emulator.call("compose", (3, 100, 40), [first.flatten().clone(), second.flatten().clone(), dest])
    assert torch.equal(dest.view(3, 100), compose.compose(first, second))


def random_map(images, tokens, num_out, long_slot=False):
    dest = torch.randint(-1, num_out, (images, tokens), dtype=torch.int32)
    if long_slot:
        dest[0, : tokens // 2] = num_out - 1
    return dest, invert.invert(dest, num_out)


def emulated_merge(emulator, x, weight, views, reduce, want_sum=True, **options):
    members, begin, count = views
    channels = x.shape[2]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.full((begin.numel() * channels,), -7, dtype=x.dtype)
    total = torch.full((begin.numel(),), -7, dtype=acc) if want_sum else None
    integers = (x.stride(1), begin.numel(), channels, DTYPES[x.dtype], REDUCES[reduce])
    weights = None if weight is None else weight.flatten()
    buffers = [flat(x), weights, members, begin.flatten(), count.flatten(), y, total]
    emulator.call("merge", integers, buffers, **options)
    return y.view(*begin.shape, channels), None if total is None else total.view(begin.shape)


# Channels: one; vectors of an element, of 4 and of 16 bytes; in float64 more than a warp has in flight.
@all_floats
@pytest.mark.parametrize("channels", [1, 6, 33, 384])
@pytest.mark.parametrize("reduce", ["sum", "mean", "amax"])
def test_merge(emulator, channels, dtype, reduce):
    dest, views = random_map(2, 90, 40, long_slot=True)
    x = whole_numbers(2, 90, channels, dtype=dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [None] if reduce == "amax" else [None, whole_numbers(2, 90, low=1, dtype=acc)]
    for weight in weights:
        y, total = emulated_merge(emulator, x, weight, views, reduce, reverse=weight is None)
        expected, expected_total = merge.merge(x, weight, dest, 40, reduce, True)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        if reduce != "amax":
            torch.testing.assert_close(total, expected_total, rtol=0, atol=0)


@pytest.mark.parametrize("reduce", ["sum", "mean", "amax"])
def test_merge_without_channels_still_sums_weights(emulator, reduce):
    dest, views = random_map(2, 90, 40, long_slot=True)
    weight = None if reduce == "amax" else whole_numbers(2, 90, low=1)
    x = torch.zeros(2, 90, 0)
    y, total = emulated_merge(emulator, x, weight, views, reduce)
    assert y.shape == (2, 40, 0)
    assert torch.equal(total, merge.merge(x, weight, dest, 40, "sum", True)[1])


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_merge_backward_without_channels_still_passes_sums_on(emulator, reduce):
    dest, views = random_map(2, 90, 40, long_slot=True)
    empty, grad_total, ones = torch.zeros(2, 90, 0), whole_numbers(2, 40), torch.ones(2, 90)
    total = merge.merge(empty, ones, dest, 40, "sum", True)[1]
    grads = (torch.zeros(2, 40, 0), grad_total, empty, torch.zeros(2, 40, 0), ones, total, dest, views, reduce)
    _, grad_weight = emulated_backward(emulator, *grads)
    assert torch.equal(grad_weight, unmerge.unmerge(grad_total[..., None], dest)[..., 0])


@pytest.mark.parametrize(
    ("dtype", "offset"),
    [(torch.bfloat16, 2), (torch.float16, 4), (torch.bfloat16, 8), (torch.float32, 4)],
    ids=str,
)
def test_merge_of_unaligned_rows(emulator, dtype, offset):
    dest, views = random_map(2, 33, 20)
    x = whole_numbers(2, 33, 70, dtype=dtype)[..., :64]
    y, _ = emulated_merge(emulator, x, None, views, "sum", want_sum=False, offset=offset)
    torch.testing.assert_close(y, merge.merge(x, None, dest, 20, "sum", False)[0], rtol=0, atol=0)


@floats
@pytest.mark.parametrize("reduce", ["sum", "mean", "amax"])
def test_merge_passes_nan_on(emulator, dtype, reduce):
    dest, views = random_map(1, 120, 9, long_slot=True)
    x = whole_numbers(1, 120, 16, dtype=dtype)
    x[0, ::7, 3] = torch.nan
    x[0, ::11, 5] = torch.inf
    y, _ = emulated_merge(emulator, x, None, views, reduce)
    torch.testing.assert_close(y, merge.merge(x, None, dest, 9, reduce, False)[0], rtol=0, atol=0, equal_nan=True)


def test_mean_of_equal_tokens_is_that_token(emulator):
    _, views = random_map(1, 300, 5, long_slot=True)
    x = torch.full((1, 300, 8), 0.1)
    y, _ = emulated_merge(emulator, x, torch.full((1, 300), 1.0), views, "mean")
    torch.testing.assert_close(y, torch.full_like(y, 0.1), rtol=3e-6, atol=0)


def test_merge_of_real_numbers_stays_within_rounding(emulator):
    dest, views = random_map(2, 200, 30, long_slot=True)
    x, weight = torch.randn(2, 200, 40), torch.rand(2, 200) + 0.5
    y, total = emulated_merge(emulator, x, weight, views, "mean")
    expected, expected_total = merge.merge(x.double(), weight.double(), dest, 30, "mean", True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.double(), expected_total, rtol=1e-6, atol=0)
    again, _ = emulated_merge(emulator, x, weight, views, "mean", reverse=True)
    assert torch.equal(y, again)


def emulated_backward(emulator, grad_y, grad_total, x, y, weight, total, dest, views, reduce, need_x=True):
    images, num_out, channels = grad_y.shape
    acc = torch.float64 if grad_y.dtype == torch.float64 else torch.float32
    rows = dest.numel()
    grad_x = torch.full((rows * channels,), -7, dtype=grad_y.dtype) if need_x else None
    grad_weight = None if weight is None else torch.full((rows,), -7, dtype=acc)
    integers = (x.stride(1), images, dest.shape[1], num_out, channels, DTYPES[grad_y.dtype], REDUCES[reduce])
    flattened = [None if t is None else t.flatten() for t in (grad_y, grad_total)]
    flattened += [flat(x), *(None if t is None else t.flatten() for t in (y, weight, total))]
    members, begin, count = views
    buffers = [*flattened, dest.flatten(), members, begin.flatten(), count.flatten(), grad_x, grad_weight]
    emulator.call("merge_backward", integers, buffers)
    return (
        None if grad_x is None else grad_x.view(*dest.shape, channels),
        None if grad_weight is None else grad_weight.view(dest.shape),
    )


@all_floats
@pytest.mark.parametrize("channels", [1, 6, 33, 384])
@pytest.mark.parametrize(
    ("reduce", "weighted"), [("sum", False), ("sum", True), ("mean", False), ("mean", True), ("amax", False)]
)
def test_merge_backward(emulator, channels, dtype, reduce, weighted):
    dest, views = random_map(2, 70, 30, long_slot=True)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    x = whole_numbers(2, 70, channels, dtype=dtype)
    weight = whole_numbers(2, 70, low=1, dtype=acc) if weighted else None
    # The reference in float64, so that the expected gradients have one rounding at the end.
    leaf = x.double().requires_grad_()
    leaf_weight = weight.double().requires_grad_() if weighted else None
    y, total = merge.merge(leaf, leaf_weight, dest, 30, reduce, True)
    grad_y = whole_numbers(*y.shape, dtype=dtype)
    grad_total = whole_numbers(*y.shape[:2], dtype=acc) if weighted else None
    value = (y * grad_y.double()).sum() + (0 if grad_total is None else (total * grad_total).sum())
    value.backward()

    kept_y = y.detach().to(dtype)
    kept_total = total.detach().to(acc) if weighted else None
    grad_x, grad_weight = emulated_backward(
        emulator, grad_y, grad_total, x, kept_y, weight, kept_total, dest, views, reduce
    )
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad_x.double(), leaf.grad, rtol=2 * eps, atol=0)
    if weighted:
        # y was rounded to the dtype, and each of C products with it is off by as much.
        bound = 4 * eps * max(channels, 1) * 9 + 1e-5
        torch.testing.assert_close(grad_weight.double(), leaf_weight.grad, rtol=0, atol=bound)
        alone = emulated_backward(
            emulator, grad_y, grad_total, x, kept_y, weight, kept_total, dest, views, reduce, need_x=False
        )[1]
        assert torch.equal(alone, grad_weight)


def test_amax_backward_with_nan(emulator):
    dest = torch.tensor([[0, 0, 0, 1, -1]], dtype=torch.int32)
    x = torch.tensor([[[1.0, torch.nan], [2.0, 1.0], [2.0, torch.nan], [torch.nan, 5.0], [0.0, 0.0]]])
    y = merge.merge(x, None, dest, 2, "amax", False)[0]
    grad, _ = emulated_backward(
        emulator, torch.ones(1, 2, 2), None, x, y, None, None, dest, invert.invert(dest, 2), "amax"
    )
    assert grad.tolist() == [[[0, 0.5], [0.5, 0], [0.5, 0.5], [1, 1], [0, 0]]]


@all_floats
@pytest.mark.parametrize("channels", [1, 6, 33, 384])
@pytest.mark.parametrize("padding", [0, 2, 8])
def test_unmerge(emulator, channels, dtype, padding):
    dest, _ = random_map(2, 50, 20)
    y = torch.randn(2, 20, channels + padding).to(dtype)[..., :channels]
    x = torch.full((100 * channels,), -7, dtype=dtype)
    emulator.call("unmerge", (y.stride(1), 2, 50, 20, channels, DTYPES[dtype]), [flat(y), dest.flatten(), x])
    assert torch.equal(x.view(2, 50, channels), unmerge.unmerge(y, dest))


def test_keys_are_in_the_order_of_scores(emulator):
    values = torch.tensor([-torch.inf, -1.0, -1e-30, -1e-45, -0.0, 0.0, 1e-45, 0.5, 1.0, torch.inf])
    result = torch.tensor(emulator.call("order", [len(values)], [values])).view(-1, 2)
    keys, indices = result[:, 0], result[:, 1]
    assert keys[4] == keys[5]
    assert (keys[1:4] > keys[:3]).all() and (keys[6:] > keys[5:-1]).all() and keys[0] > 0
    assert indices.tolist() == list(range(len(values)))


@pytest.mark.parametrize(
    ("channels", "size", "alignment", "expected"),
    [
        (1024, 2, 0, (16, 128, 5, 8)),
        (384, 2, 0, (16, 48, 4, 16)),
        (384, 2, 4, (4, 192, 5, 8)),
        (33, 2, 0, (2, 33, 4, 16)),
        (33, 4, 0, (4, 33, 4, 16)),
        (1, 2, 0, (2, 1, 0, 256)),
        (8, 2, 0, (16, 1, 0, 256)),
        (3, 8, 0, (8, 3, 0, 256)),
        (0, 4, 0, (16, 0, 0, 256)),
    ],
)
def test_rows_are_cut_into_the_widest_vectors(emulator, channels, size, alignment, expected):
    assert emulator.call("row_config", (channels, size, alignment)) == expected
