# SPDX-License-Identifier: MIT
import math
import statistics

import pytest
import torch
from support import (
    COSINE_BAND,
    DTYPES,
    assert_follows,
    assert_views,
    every_other_dest,
    every_other_partners,
    exact_tokens,
    golden,
    slow,
)

import tokred_kernels as tk
from tokred_kernels.partition import every_other


@pytest.mark.parametrize("name", ["algm_global_0.npz", "algm_global_1.npz"])
def test_reproduces_the_authors_code(device, name):
    arrays, params = golden(name)
    x = arrays["x"].to(device)
    token_map = tk.adaptive_bipartite_match(x, **params)
    y, size = tk.merge_wavg(x, token_map, arrays["size"].to(device))
    torch.testing.assert_close(y.cpu(), arrays["merged_wavg"])
    assert torch.equal(size.cpu(), arrays["merged_size"])


def reached(rows, layer_index=None, threshold=None, own=True, band=0.0):
    """How many of each row of scores reach the threshold, or their mean and deviation: averaged unless `own`."""
    if layer_index is None:
        levels = [threshold] * len(rows)
    else:
        present = [[score for score in row if score > -math.inf] for row in rows]
        if not own and any(len(row) < 2 for row in present):
            return [0] * len(rows)
        moments = [(statistics.fmean(row), statistics.stdev(row)) if len(row) > 1 else None for row in present]
        if not own:
            moments = [[statistics.fmean(part) for part in zip(*moments, strict=True)]] * len(rows)
        levels = [math.inf if m is None else m[0] + m[1] / layer_index for m in moments]
    return [
        sum(score >= level + band and score > -math.inf for score in row)
        for row, level in zip(rows, levels, strict=True)
    ]


def scores(best):
    """The highest cosine of each source."""
    return [score for score, _ in best.values()]


def check(metric, partners, prefix, **how):
    """All ways of counting against the truth, on the backend in use."""
    number = metric.shape[1]
    rows = [scores(best) for best in partners]
    smallest = min(reached(rows, own=False, **how))
    token_map = tk.adaptive_bipartite_match(metric, num_prefix=prefix, **how)
    assert token_map.dest.tolist() == [every_other_dest(best, number, smallest, prefix) for best in partners]
    assert token_map.num_out == number - smallest
    assert_views(token_map)
    packed = tk.adaptive_bipartite_match(metric, num_prefix=prefix, count="image", **how)
    counts = reached(rows, **how)
    assert packed.packed.lengths == tuple(number - r for r in counts)
    assert packed.packed_in is None
    assert_views(packed)
    for image, r in enumerate(counts):
        assert packed.image(image).dest.tolist() == [every_other_dest(partners[image], number, r, prefix)]


@pytest.mark.parametrize("tokens", [1, 2, 3, 12, *slow(197)])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_is_what_the_definition_says(device, tokens, prefix):
    for channels, dtype in zip((1, 16, 64), DTYPES, strict=True):
        metric = exact_tokens(3, tokens, channels)
        metric[0] = exact_tokens(1, channels, zeros=0)  # in one image all tokens are equal
        partners = [every_other_partners(image, prefix) for image in metric]
        metric = metric.to(device, dtype)
        for threshold in (-2.0, 0.0, 0.01, 0.5, 1.0):
            check(metric, partners, prefix, threshold=threshold)
        for layer in (1, 9):
            check(metric[1:], partners[1:], prefix, layer_index=layer)


@pytest.mark.parametrize("tokens,channels", [(12, 3), *slow((197, 385), (577, 64))])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_is_right_for_any_values(device, tokens, channels, dtype):
    metric = torch.randn(2, tokens, channels).to(dtype)
    rows = [scores(every_other_partners(image, 1)) for image in metric]
    for how in ({"layer_index": 1}, {"layer_index": 6}, {"threshold": statistics.fmean(rows[0])}):
        least, most = (min(reached(rows, own=False, band=band, **how)) for band in (COSINE_BAND, -COSINE_BAND))
        token_map = tk.adaptive_bipartite_match(metric.to(device), class_token=True, **how)
        r = tokens - token_map.num_out
        assert least <= r <= most
        assert_follows(token_map, metric, every_other(tokens, tokens, 1, False, False)._replace(r=r))


def test_keys_of_all_heads_are_averaged(device):
    keys = torch.randn(2, 33, 3, 4, 16, device=device)[:, :, 1].transpose(1, 2)
    for count in ("batch", "image"):
        got, want = (tk.adaptive_bipartite_match(m, layer_index=2, count=count) for m in (keys, keys.mean(1)))
        assert torch.equal(got.dest, want.dest)
        assert got.dest.shape == (2, 33)


def test_an_image_in_a_batch_equals_the_image_alone(device):
    for metric in (torch.randn(5, 197, 48), exact_tokens(5, 197, 16)):
        on_device = metric.to(device)
        for how in ({"layer_index": 3}, {"threshold": 0.4}):
            packed = tk.adaptive_bipartite_match(on_device, class_token=True, count="image", **how)
            assert len(set(packed.packed.lengths)) > 1
            for image in range(5):
                alone = tk.adaptive_bipartite_match(on_device[image : image + 1], class_token=True, **how)
                assert torch.equal(packed.image(image).dest, alone.dest)
                assert packed.packed.lengths[image] == alone.num_out


LENGTHS = (40, 0, 1, 2, 3, 197, 17, 6)


@pytest.mark.parametrize("protected", [{}, {"class_token": True}, {"distill_token": True}, {"num_prefix": 5}], ids=str)
@pytest.mark.parametrize(
    "how", [{"layer_index": 2}, {"threshold": -2.0}, {"threshold": 0.1}, {"threshold": 2}], ids=str
)
def test_packed_tokens_equal_each_image_alone(device, protected, how):
    packing = tk.Packing.of(LENGTHS, torch.device(device))
    dense = exact_tokens(packing.rows, 16).to(device)
    for metric in (dense, exact_tokens(packing.rows, 32).to(device)[:, ::2]):
        token_map = tk.adaptive_bipartite_match(metric, count="image", packed=packing, **protected, **how)
        assert token_map.packed_in is packing
        assert token_map.in_shape == (packing.rows,)
        assert token_map.out_shape == (sum(token_map.packed.lengths),)
        assert_views(token_map)
        for image, tokens in enumerate(metric.split(LENGTHS)):
            alone = tk.adaptive_bipartite_match(tokens[None], **protected, **how)
            assert torch.equal(token_map.image(image).dest, alone.dest)
            assert token_map.packed.lengths[image] == alone.num_out


def test_a_local_match_then_a_global_match_of_packed_tokens(device):
    x = torch.randn(3, 65, 24, device=device)
    first = tk.window_match(x, 0.05, count="image", num_prefix=1)
    y, size = tk.merge_wavg(x, first)
    second = tk.adaptive_bipartite_match(y, layer_index=2, class_token=True, count="image", packed=first.packed)
    z, total = tk.merge_wavg(y, second, size)
    both = first.then(second)
    assert both.in_shape == (3, 65)
    torch.testing.assert_close(tk.merge(x, both), z)
    for image in range(3):
        local = tk.window_match(x[image : image + 1], 0.05, num_prefix=1)
        merged, sizes = tk.merge_wavg(x[image : image + 1], local)
        globally = tk.adaptive_bipartite_match(merged, layer_index=2, class_token=True)
        assert torch.equal(both.image(image).dest, local.then(globally).dest)
        rows = slice(*second.packed.cu_seqlens[image : image + 2].tolist())
        expected, expected_size = tk.merge_wavg(merged, globally, sizes)
        torch.testing.assert_close(z[rows], expected[0])
        assert torch.equal(total[rows], expected_size[0])


def test_a_given_count_is_a_bipartite_match(device):
    metric = torch.randn(3, 50, 8, device=device)
    for number in (0, 1, 10, 1000):
        for protected in ({}, {"class_token": True}, {"num_prefix": 5}, {"class_token": True, "distill_token": True}):
            token_map = tk.adaptive_bipartite_match(metric, count=number, **protected)
            expected = tk.bipartite_match(metric, number, **protected)
            assert torch.equal(token_map.dest, expected.dest)
            assert token_map.num_out == expected.num_out


def test_the_threshold_falls_with_the_layer_index(device):
    metric = torch.randn(2, 100, 16, device=device)
    left = [tk.adaptive_bipartite_match(metric, layer_index=layer).num_out for layer in (0.5, 1, 2, 4, 1e9)]
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-1]


def test_nothing_to_merge_in_one_image_is_the_identity(device):
    metric = torch.ones(2, 12, 4, device=device)
    metric[1, ::2] *= -1
    identity = torch.arange(12).expand(2, 12).tolist()
    assert tk.adaptive_bipartite_match(metric, threshold=0.5).dest.tolist() == identity
    assert tk.adaptive_bipartite_match(metric, threshold=math.inf, class_token=True).dest.tolist() == identity
    assert tk.adaptive_bipartite_match(metric, threshold=0.5, count=0).dest.tolist() == identity
    packed = tk.adaptive_bipartite_match(metric, threshold=0.5, count="image")
    assert packed.packed.lengths == (6, 12)
    assert packed.image(1).dest.tolist() == identity[:1]


def test_all_tokens_identical(device):
    metric = torch.full((2, 7, 4), -3.0, device=device)
    for how in ({"layer_index": 3}, {"threshold": 1.0}):
        # All sources reach their mean, and join the first of the destinations.
        assert tk.adaptive_bipartite_match(metric, **how).dest.tolist() == [[0, 0, 0, 1, 0, 2, 0]] * 2
        assert tk.adaptive_bipartite_match(metric, class_token=True, **how).dest.tolist() == [[0, 1, 1, 2, 1, 3, 1]] * 2
    zeros = metric * 0
    assert tk.adaptive_bipartite_match(zeros, threshold=0.1).num_out == 7, "zero tokens are similar to nothing"
    assert tk.adaptive_bipartite_match(zeros, threshold=0.0).num_out == 3


def test_a_distillation_token_keeps_its_slot_where_all_sources_join(device):
    metric = torch.ones(2, 6, 4, device=device)
    for count, offset in (("batch", 0), ("image", 3)):
        token_map = tk.adaptive_bipartite_match(metric, threshold=0.5, distill_token=True, count=count)
        assert token_map.dest.tolist() == [[1, 0, 1, 1, 1, 2], [n + offset for n in (1, 0, 1, 1, 1, 2)]]
        assert token_map.count.flatten().tolist() == [1, 4, 1] * 2
        assert_views(token_map)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tokens_that_are_not_finite_never_join(device, value):
    metric = torch.randn(1, 24, 16, device=device)
    metric[0, 6] = value
    metric[0, 9, 3] = value
    for how in ({"threshold": -2.0}, {"threshold": -math.inf}, {"layer_index": 2}):
        token_map = tk.adaptive_bipartite_match(metric, **how)
        assert token_map.count[0, token_map.dest[0, 6]] == 1
        assert token_map.count[0, token_map.dest[0, 9]] == 1
        rows = [scores(every_other_partners(metric[0], 0))]
        assert 24 - token_map.num_out == reached(rows, **how)[0]
    assert tk.adaptive_bipartite_match(metric, threshold=-2.0).num_out == 24 - 11


def test_too_few_tokens_give_the_identity(device):
    for tokens, protected in ((0, {}), (1, {}), (2, {"class_token": True}), (3, {"distill_token": True})):
        metric = torch.ones(2, tokens, 4, device=device)
        for how in ({"threshold": -2.0}, {"layer_index": 1}):
            token_map = tk.adaptive_bipartite_match(metric, **protected, **how)
            assert token_map.dest.tolist() == [list(range(tokens))] * 2
            packed = tk.adaptive_bipartite_match(metric, count="image", **protected, **how)
            assert packed.packed.lengths == (tokens, tokens)
            assert packed.dest.tolist() == [list(range(tokens)), list(range(tokens, 2 * tokens))]
            assert_views(packed)


def test_packed_images_of_too_few_tokens_give_the_identity(device):
    packing = tk.Packing.of((1, 0, 1), torch.device(device))
    metric = torch.ones(2, 4, device=device)
    token_map = tk.adaptive_bipartite_match(metric, threshold=-2.0, count="image", packed=packing)
    assert token_map.dest.tolist() == [0, 1]
    assert token_map.packed_in is packing
    assert (token_map.in_shape, token_map.out_shape, token_map.packed.lengths) == ((2,), (2,), (1, 0, 1))
    assert_views(token_map)


def test_empty_batch_and_no_channels(device):
    for tokens in (0, 1, 9):
        metric = torch.randn(0, tokens, 4, device=device)
        for count in ("batch", "image", 2):
            token_map = tk.adaptive_bipartite_match(metric, threshold=0.5, count=count)
            assert token_map.dest.shape == (0, tokens)
        keys = torch.randn(0, 3, tokens, 4, device=device)
        assert tk.adaptive_bipartite_match(keys, threshold=0.5, count="image").dest.shape == (0, tokens)
    nothing = tk.Packing.of((), torch.device(device))
    packed = tk.adaptive_bipartite_match(torch.randn(0, 4, device=device), threshold=0.5, count="image", packed=nothing)
    assert (packed.in_shape, packed.out_shape, packed.batch) == ((0,), (0,), 0)
    assert tk.adaptive_bipartite_match(torch.randn(1, 9, 0, device=device), threshold=0.5).num_out == 9


def test_leaves_no_gradient(device):
    metric = torch.randn(2, 17, 8, device=device, requires_grad=True)
    for count in ("batch", "image", 3):
        token_map = tk.adaptive_bipartite_match(metric, layer_index=2, count=count)
        assert not token_map.dest.requires_grad
        assert torch.autograd.grad(tk.merge(metric, token_map).sum(), metric)[0].shape == metric.shape


def test_a_backend_that_cannot_run_the_call_raises():
    with tk.use_backend("cuda"), pytest.raises(RuntimeError, match=r'"cuda" was requested .*can: reference, cpu'):
        tk.adaptive_bipartite_match(torch.randn(1, 9, 4), threshold=0.5)


PACKED = tk.Packing.of((4, 5), torch.device("cpu"))


def match(metric, **settings):
    return tk.adaptive_bipartite_match(metric, **{"threshold": 0.5, **settings})


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda m: match(m, threshold=math.nan), ValueError, "threshold must be a number, got NaN"),
        (lambda m: match(m, threshold="0.5"), TypeError, "threshold must be a number, got str"),
        (lambda m: match(m, threshold=False), TypeError, "threshold must be a number, got bool"),
        (lambda m: match(m, threshold=None), ValueError, "give layer_index or threshold, got layer_index=None and thr"),
        (lambda m: match(m, layer_index=1), ValueError, "give layer_index or threshold, got layer_index=1 and"),
        (lambda m: match(m, layer_index=0), ValueError, "layer_index must be above 0, and finite, got 0"),
        (lambda m: match(m, layer_index=-1), ValueError, "layer_index must be above 0, and finite, got -1"),
        (lambda m: match(m, layer_index=math.nan), ValueError, "layer_index must be above 0, and finite, got NaN"),
        (lambda m: match(m, layer_index=math.inf), ValueError, "layer_index must be above 0, and finite, got inf"),
        (lambda m: match(m, layer_index="1"), TypeError, "layer_index must be a number, got str"),
        (lambda m: match(m, layer_index=True), TypeError, "layer_index must be a number, got bool"),
        (lambda m: match(m, count="all"), ValueError, 'count must be "batch", "image" or an int, got \'all\''),
        (lambda m: match(m, count=-1), ValueError, "count must be at least 0, got -1"),
        (lambda m: match(m, count=True), TypeError, "count must be an int, got bool"),
        (lambda m: match(m, count="image", group=1), ValueError, 'group must be None unless count="batch"'),
        (lambda m: match(m, count=1, group=1), ValueError, "group must be None unless .*got count=1"),
        (lambda m: match(m[0], packed=PACKED), ValueError, "packed needs count=\"image\", got count='batch'"),
        (lambda m: match(m[0], packed=PACKED, count=2), ValueError, 'packed needs count="image", got count=2'),
        (lambda m: match(m[0], packed=(4, 5), count="image"), TypeError, "packed must be a Packing, got tuple"),
        (lambda m: match(m, packed=PACKED, count="image"), ValueError, r"metric must be \(T, D\) with the T = 9 rows"),
        (lambda m: match(m[0, 1:], packed=PACKED, count="image"), ValueError, r"metric must be \(T, D\).*\(8, 4\)"),
        (lambda m: match(m[0].int(), packed=PACKED, count="image"), TypeError, "metric must be float32.*int32"),
        (lambda m: match(m[0].to("meta"), packed=PACKED, count="image"), ValueError, "packed is on cpu but metric is"),
        (lambda m: match(m[0]), ValueError, r"metric must be \(B, N, D\).*\(9, 4\)"),
        (lambda m: match(m.int()), TypeError, "metric must be float32.*int32"),
        (lambda m: match(m, num_prefix=1, class_token=True), ValueError, "num_prefix or class_token"),
        (lambda m: match(m, num_prefix=-1), ValueError, "num_prefix must be at least 0, got -1"),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=rf"^tokred_kernels\.adaptive_bipartite_match: .*{words}"):
        call(torch.randn(2, 9, 4))
