# SPDX-License-Identifier: MIT
import itertools

import pytest
import torch
from support import (
    DTYPES,
    PACKED_TOKENS,
    assert_sum_close,
    golden,
    images_in,
    images_out,
    random_map,
    random_packed_map,
    slow,
)

import tokred_kernels as tk

REDUCES = ("sum", "mean", "amax")


def exact(x, token_map, reduce, weight=None):
    """The reference in float64."""
    with tk.use_backend("reference"):
        return tk.merge(x.double(), token_map, reduce=reduce, weight=None if weight is None else weight.double())


@pytest.mark.parametrize("name", ["tome_0.npz", "tome_1.npz", "tome_2.npz"])
@pytest.mark.parametrize("reduce", REDUCES)
def test_reproduces_the_authors_code(name, device, reduce):
    arrays, params = golden(name, device)
    token_map = tk.bipartite_match(arrays["metric"], **params)
    torch.testing.assert_close(tk.merge(arrays["x"], token_map, reduce=reduce), arrays[f"merged_{reduce}"])


# (tokens, slots, channels): one each way, all into one, more slots than tokens, odd, and around a power of two.
# Channels: one, odd, a block, and more than one block.
SHAPES = [
    *((1, 1, 1), (2, 1, 33), (3, 2, 256), (5, 9, 2), (17, 1, 257), (17, 9, 130), (75, 70, 64), (90, 2, 384)),
    *slow((197, 181, 384), (198, 99, 257), (577, 64, 256), (1024, 1023, 33), (1024, 5, 1)),
]


@pytest.mark.parametrize("tokens,slots,channels", SHAPES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_equals_float64(device, tokens, slots, channels, dtype):
    x = torch.randn(2, tokens, channels).to(dtype)
    token_map = random_map(2, tokens, slots, dropped=0.2)
    weight = torch.rand(2, tokens) + 0.5
    on_device = token_map.to(device)
    for reduce, weighted in itertools.product(REDUCES, (False, True)):
        if reduce == "amax" and weighted:
            continue
        w = weight if weighted else None
        y = tk.merge(x.to(device), on_device, reduce=reduce, weight=None if w is None else w.to(device)).cpu()
        assert y.dtype == dtype
        expected = exact(x, token_map, reduce, w)
        if reduce == "amax":
            assert torch.equal(y.double(), expected)
        else:
            magnitude = exact(x.abs(), token_map, reduce, w)
            assert_sum_close(y, expected, int(token_map.count.max()), magnitude)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens,channels", slow((577, 1280), (4096, 384)))
def test_equals_float64_at_model_sizes(device, dtype, tokens, channels):
    x = torch.randn(2, tokens, channels).to(dtype)
    token_map = tk.bipartite_match(torch.randn(2, tokens, 16, device=device), tokens // 3, class_token=True)
    y = tk.merge(x.to(device), token_map).cpu()
    on_cpu = token_map.to("cpu")
    assert_sum_close(y, exact(x, on_cpu, "mean"), int(on_cpu.count.max()), exact(x.abs(), on_cpu, "mean"))


def test_reads_strided_tokens(device):
    token_map = random_map(2, 9, 4, device=device)
    base = torch.randn(2, 9, 3, 8, device=device)
    views = {
        "rows apart": base[:, :, 1],
        "channels apart": base[:, :, :, ::2].flatten(2)[:, :, ::3],
        "transposed": torch.randn(2, 8, 9, device=device).transpose(1, 2),
        "expanded": torch.randn(2, 1, 8, device=device).expand(2, 9, 8),
        "images swapped": torch.randn(9, 2, 8, device=device).transpose(0, 1),
        "sliced": torch.randn(2, 12, 8, device=device)[:, 3:],
    }
    for name, x in views.items():
        assert torch.equal(
            tk.merge(x, token_map), tk.merge(x.clone(memory_format=torch.contiguous_format), token_map)
        ), name


def test_a_slot_without_members_is_zero(device):
    token_map = tk.TokenMap.from_dest(torch.tensor([[0, 0, -1]]), 3).to(device)
    x = torch.ones(1, 3, 2, device=device)
    for reduce in REDUCES:
        assert (tk.merge(x, token_map, reduce=reduce)[0, 1:] == 0).all()


def test_nan_stays_in_its_slot(device):
    token_map = tk.TokenMap.from_dest(torch.tensor([[0, 1, 0, 1, -1]])).to(device)
    x = torch.ones(1, 5, 3, device=device)
    x[0, 0, 1] = float("nan")
    x[0, 4] = float("nan")  # dropped
    for reduce in REDUCES:
        y = tk.merge(x, token_map, reduce=reduce)[0]
        assert y.isnan().tolist() == [[False, True, False], [False, False, False]], reduce


def test_no_nan_is_rounded_to_a_number(device):
    # All bits of the fraction set: rounding to bfloat16 by adding would carry it over infinity, to a zero.
    weight = torch.tensor([[0x7FFFFFFF, 0x3F800000]], dtype=torch.int32, device=device).view(torch.float32)
    token_map = tk.TokenMap.from_dest(torch.zeros(1, 2, dtype=torch.int64)).to(device)
    for dtype in DTYPES:
        x = torch.ones(1, 2, 3, dtype=dtype, device=device)
        assert tk.merge(x, token_map, reduce="sum", weight=weight).isnan().all(), dtype


def test_nan_is_the_maximum_from_any_place(device):
    token_map = tk.TokenMap.from_dest(torch.zeros(1, 3, dtype=torch.int64)).to(device)
    for place in range(3):
        x = torch.ones(1, 3, 1, device=device)
        x[0, place] = float("nan")
        assert tk.merge(x, token_map, reduce="amax").isnan().all()


def test_weights_may_carry_a_last_dimension_and_other_floats(device):
    x = torch.randn(2, 6, 4, device=device)
    token_map = random_map(2, 6, 3, device=device)
    weight = torch.rand(2, 6, device=device).half().float()
    expected = tk.merge(x, token_map, weight=weight)
    assert torch.equal(tk.merge(x, token_map, weight=weight[..., None]), expected)
    assert torch.equal(tk.merge(x, token_map, weight=weight.half()), expected)
    assert torch.equal(tk.merge(x, token_map, weight=weight.double()), expected)


def test_half_precision_sums_in_float32(device):
    # 300 ones in float16 and 300 in bfloat16, where 256 + 1 = 256.
    token_map = tk.TokenMap.from_dest(torch.zeros(1, 300, dtype=torch.int64)).to(device)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.ones(1, 300, 2, dtype=dtype, device=device)
        assert (tk.merge(x, token_map, reduce="mean") == 1).all()
        assert (tk.merge(x, token_map, reduce="sum") == 300).all()


def test_empty_batch_no_tokens_and_no_channels(device):
    for batch, tokens, slots, channels in ((0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 3, 0), (2, 5, 0, 4)):
        x = torch.randn(batch, tokens, channels, device=device, requires_grad=True)
        token_map = random_map(batch, tokens, slots, device=device)
        with tk.use_backend("reference"):
            for reduce in REDUCES:
                assert tk.merge(x, token_map, reduce=reduce).shape == (batch, slots, channels)
        y = tk.merge(x, token_map)
        assert y.shape == (batch, slots, channels)
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert (x.grad == 0).all()


@pytest.mark.slow
def test_two_runs_are_equal_bit_by_bit(device):
    x = torch.randn(4, 577, 384, device=device, requires_grad=True)
    weight = torch.rand(4, 577, device=device, requires_grad=True)
    token_map = random_map(4, 577, 40, device=device)
    runs = []
    for _ in range(2):
        y = tk.merge(x, token_map, weight=weight)
        runs.append((y, *torch.autograd.grad(y.sin().sum(), (x, weight))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.backends("reference", "cpu")
@pytest.mark.parametrize("reduce", REDUCES)
@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_gradcheck(device, reduce, dropped):
    token_map = random_map(2, 9, 5, dropped=dropped)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    weight = (torch.rand(2, 9, 1, dtype=torch.float64) + 0.5).requires_grad_()
    fixed = x.detach()
    assert torch.autograd.gradcheck(lambda x: tk.merge(x, token_map, reduce=reduce), x)
    if reduce != "amax":
        assert torch.autograd.gradcheck(lambda x, w: tk.merge(x, token_map, reduce=reduce, weight=w), (x, weight))
        assert torch.autograd.gradcheck(lambda w: tk.merge(fixed, token_map, reduce=reduce, weight=w), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduce,weighted", [("sum", True), ("mean", True), ("mean", False), ("amax", False)])
@pytest.mark.parametrize("channels", [1, 33, 130])
def test_gradients_equal_float64(device, dtype, reduce, weighted, channels):
    token_map = random_map(2, 50, 11, dropped=0.1)
    x = torch.randn(2, 50, channels).to(dtype)
    weight = torch.rand(2, 50) + 0.5 if weighted else None
    grad = torch.randn(2, 11, channels).to(dtype)

    def gradients(x, weight, grad, token_map):
        x = x.detach().requires_grad_()
        inputs = (x,) if weight is None else (x, weight.detach().requires_grad_())
        y = tk.merge(x, token_map, reduce=reduce, weight=None if weight is None else inputs[1])
        return torch.autograd.grad(y, inputs, grad)

    got = gradients(x.to(device), None if weight is None else weight.to(device), grad.to(device), token_map.to(device))
    with tk.use_backend("reference"):
        want = gradients(x.double(), None if weight is None else weight.double(), grad.double(), token_map)
    assert got[0].dtype == dtype
    assert_sum_close(got[0].cpu(), want[0], 4)
    if weight is not None:
        assert got[1].dtype == torch.float32
        # y comes back rounded to its dtype, and a dot product adds a rounding a channel.
        scale = torch.finfo(dtype).eps * (x.abs().amax() + 1) * grad.abs().sum(-1).amax()
        assert (got[1].cpu() - want[1]).abs().max() <= float(scale)


def test_the_maximum_divides_its_gradient_between_ties(device):
    token_map = tk.TokenMap.from_dest(torch.tensor([[0, 0, 0, 1]])).to(device)
    x = torch.tensor([[[0.0, 2.0], [0.0, 1.0], [0.0, 2.0], [5.0, 5.0]]], device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(tk.merge(x, token_map, reduce="amax").sum(), x)
    third = 1 / 3
    torch.testing.assert_close(grad.cpu(), torch.tensor([[[third, 0.5], [third, 0], [third, 0.5], [1, 1]]]))


@pytest.mark.parametrize("largest", [float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, 0.1])
def test_the_gradient_of_any_maximum_goes_to_those_that_have_it(device, largest):
    values = torch.tensor([[largest, largest, largest, -float("inf")]])
    values = torch.cat([values, values.flip(1)])[..., None]
    having = (values == largest) | values.isnan()
    token_map = tk.TokenMap.from_dest(torch.zeros(2, 4, dtype=torch.int64)).to(device)
    x = values.to(device).requires_grad_()
    y = tk.merge(x, token_map, reduce="amax")
    torch.testing.assert_close(y.detach().cpu(), torch.full((2, 1, 1), largest), rtol=0, atol=0, equal_nan=True)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad.cpu(), having / having.sum(1, keepdim=True))


def test_merge_and_its_gradient_are_adjoint():
    token_map = random_map(3, 40, 13, dropped=0.2)
    x, y = torch.randn(3, 40, 6, dtype=torch.float64), torch.randn(3, 13, 6, dtype=torch.float64)
    forward = (tk.merge(x, token_map, reduce="sum") * y).sum()
    backward = (x * tk.unmerge(y, token_map)).sum()
    torch.testing.assert_close(forward, backward)


def test_second_derivatives_raise():
    x = torch.randn(1, 4, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(tk.merge(x, random_map(1, 4, 2)).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="merge: second derivatives are not supported"):
        grad.sum().backward()


def test_only_required_gradients_are_computed(device):
    x = torch.randn(1, 4, 2, device=device)
    weight = torch.rand(1, 4, device=device, requires_grad=True)
    tk.merge(x, random_map(1, 4, 2, device=device), weight=weight).sum().backward()
    assert weight.grad is not None
    assert x.grad is None


@PACKED_TOKENS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_map_merges_each_image_as_if_alone(device, tokens, dtype):
    token_map = random_packed_map(tokens, dropped=0.2, device=device)
    x = torch.randn(*token_map.in_shape, 33, device=device).to(dtype)
    weight = torch.rand(token_map.in_shape, device=device) + 0.5
    for reduce, w in (("sum", None), ("mean", None), ("amax", None), ("sum", weight), ("mean", weight[..., None])):
        y = tk.merge(x, token_map, reduce=reduce, weight=w)
        assert y.shape == (23, 33)
        assert y.dtype == dtype
        weights = [None] * 4 if w is None else images_in(w, token_map)
        parts = zip(images_in(x, token_map), weights, images_out(y, token_map), strict=True)
        for image, (rows, own, merged) in enumerate(parts):
            alone = tk.merge(rows.view(1, -1, 33), token_map.image(image), reduce=reduce, weight=own)
            torch.testing.assert_close(merged, alone)


@pytest.mark.backends("reference", "cpu")
@PACKED_TOKENS
def test_gradcheck_along_a_packed_map(tokens, device):
    token_map = random_packed_map(tokens, dropped=0.2)
    x = torch.randn(*token_map.in_shape, 2, dtype=torch.float64, requires_grad=True)
    weight = (torch.rand(token_map.in_shape, dtype=torch.float64) + 0.5).requires_grad_()
    for reduce in REDUCES:
        assert torch.autograd.gradcheck(lambda x, r=reduce: tk.merge(x, token_map, reduce=r), x)
    for reduce in ("mean", "sum"):
        merge = lambda x, w, r=reduce: tk.merge(x, token_map, reduce=r, weight=w)  # noqa: E731
        assert torch.autograd.gradcheck(merge, (x, weight))


@PACKED_TOKENS
def test_a_packed_map_takes_no_channels(device, tokens):
    token_map = random_packed_map(tokens, device=device)
    for reduce in REDUCES:
        assert tk.merge(torch.randn(*token_map.in_shape, 0, device=device), token_map, reduce=reduce).shape == (
            23,
            0,
        )


@PACKED_TOKENS
def test_a_packed_map_takes_strided_tokens(device, tokens):
    token_map = random_packed_map(tokens, device=device)
    x = torch.randn(*token_map.in_shape, 12, device=device)[..., ::3]
    weight = torch.rand(*token_map.in_shape, 4, device=device)[..., 0]
    expected = tk.merge(x.contiguous(), token_map, weight=weight.contiguous())
    assert torch.equal(tk.merge(x, token_map, weight=weight), expected)


IN_ROWS = random_packed_map((9, 0, 4, 40))
IN_IMAGES = random_packed_map(23)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda: tk.merge(torch.ones(1, 53, 2), IN_ROWS), ValueError, r"x must be \(T, C\), packed, got shape \(1"),
        (lambda: tk.merge(torch.ones(52, 2), IN_ROWS), ValueError, r"x is \(52, 2\), the map takes \(53, '?C'?\)"),
        (lambda: tk.merge(torch.ones(92, 2), IN_IMAGES), ValueError, r"x must be \(B, N, C\), got shape \(92, 2\)"),
        (lambda: tk.merge(torch.ones(1, 92, 2), IN_IMAGES), ValueError, r"the map takes \(4, 23, '?C'?\)"),
        (
            lambda: tk.merge(torch.ones(53, 2), IN_ROWS, weight=torch.ones(1, 53)),
            ValueError,
            r"weight must be \(53,\) or \(53, 1\) as x is \(53, 2\), got \(1, 53\)",
        ),
        (lambda: tk.merge(torch.ones(53, 2, device="meta"), IN_ROWS), ValueError, "token_map is on cpu but x is on"),
    ],
)
def test_bad_input_for_a_packed_map_names_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call()


A_MAP = tk.TokenMap.identity(2, 9)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda x: tk.merge(x[0], A_MAP), ValueError, r"x must be \(B, N, C\), got shape \(9, 4\)"),
        (lambda x: tk.merge(x[:1], A_MAP), ValueError, r"token_map must be made for x's tokens: x is \(1, 9, 4\)"),
        (lambda x: tk.merge(x[:, :5], A_MAP), ValueError, r"x is \(2, 5, 4\), the map takes \(2, 9, '?C'?\)"),
        (lambda x: tk.merge(x.int(), A_MAP), TypeError, "x must be float32.*int32"),
        (lambda x: tk.merge(x.to_sparse(), A_MAP), TypeError, "dense"),
        (lambda x: tk.merge(x, A_MAP.dest), TypeError, "token_map must be a TokenMap, got Tensor"),
        (lambda x: tk.merge(x, A_MAP, reduce="min"), ValueError, "reduce must be one of mean, sum, amax, max, got"),
        (lambda x: tk.merge(x, A_MAP, reduce="amax", weight=x[..., 0]), ValueError, "weight must be None"),
        (lambda x: tk.merge(x, A_MAP, weight=x), ValueError, r"weight must be \(2, 9\) or \(2, 9, 1\).*\(2, 9, 4\)"),
        (lambda x: tk.merge(x, A_MAP, weight=x[..., 0].int()), TypeError, "weight must be float32"),
        (lambda x: tk.merge(x.to("meta"), A_MAP), ValueError, "token_map is on cpu but x is on meta"),
        (lambda x: tk.merge(x, A_MAP, weight=x[..., 0].to("meta")), ValueError, "weight is on meta but x is on cpu"),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.randn(2, 9, 4))


@pytest.mark.parametrize("outer", [0, 5, 64, 4096])
@pytest.mark.parametrize("stride", [0, 1, 64, 262144])
def test_one_token_an_image_whatever_its_stride(device, outer, stride):
    x = torch.randn(10000 * 3, device=device).as_strided((3, 1, 64), (outer, stride, 1))
    token_map = tk.TokenMap.from_dest(torch.zeros(3, 1, dtype=torch.int32)).to(device)
    for reduce in ("mean", "sum", "amax"):
        assert torch.equal(tk.merge(x, token_map, reduce=reduce), x)
    assert torch.equal(tk.merge_wavg(x, token_map)[0], x)
    weight = torch.full((3, 1), 2.0, device=device, requires_grad=True)
    tk.merge(x, token_map, reduce="sum", weight=weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(-1))


@pytest.mark.parametrize("held", [1.0, torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("channels", [4, 0])
def test_a_mean_without_weight_is_zero_and_so_are_its_gradients(device, held, channels):
    token_map = tk.TokenMap.from_dest(torch.tensor([[0, 0, 1, 1, -1, 2]], device=device), 4)
    x = torch.ones(1, 6, channels, device=device)
    x[0, [0, 4, 5]] = held  # in a slot without weight, of two members and of one, and in a token that is dropped
    weight = torch.tensor([[0.0, 0.0, 1.0, 3.0, 2.0, 0.0]], device=device)
    for get in (lambda x, w: tk.merge(x, token_map, weight=w), lambda x, w: tk.merge_wavg(x, token_map, w)[0]):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = get(*leaves)
        assert y.tolist() == [[[0.0] * channels, [1.0] * channels, [0.0] * channels, [0.0] * channels]]
        y.sum().backward()
        expected = torch.tensor([0.0, 0.0, 0.25, 0.75, 0.0, 0.0]).view(1, 6, 1).expand(1, 6, channels)
        assert torch.equal(leaves[0].grad.cpu(), expected)
        assert leaves[1].grad.tolist() == [[0.0] * 6]


def test_sizes_of_zero_have_gradients(device):
    token_map = tk.TokenMap.from_dest(torch.tensor([[0, 0, 1]], device=device), 2)
    x = torch.ones(1, 3, 4, device=device)
    size = torch.zeros(1, 3, 1, device=device, requires_grad=True)
    y, total = tk.merge_wavg(x, token_map, size)
    assert (y == 0).all() and (total == 0).all()
    (total * torch.tensor([[[2.0], [5.0]]], device=device)).sum().backward()
    assert size.grad.flatten().tolist() == [2.0, 2.0, 5.0]
