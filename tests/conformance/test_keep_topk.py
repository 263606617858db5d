# SPDX-License-Identifier: MIT
import itertools
import math

import pytest
import torch
from support import DTYPES, assert_views, dest_of, golden, slow

import tokred_kernels as tk
from tokred_kernels.checks import MAX_ROWS

ALL_DTYPES = (*DTYPES, torch.float64)


def truth(scores, k, prefix, fuse):
    """The slots of one image, from its scores."""
    value = [-math.inf if math.isnan(score) else score for score in scores.tolist()]
    order = sorted(range(prefix, len(value)), key=lambda n: (-value[n], n))
    slots = [[n] for n in (*range(prefix), *order[:k])]
    return [*slots, sorted(order[k:])] if fuse and order[k:] else slots


def assert_keeps(token_map, scores, k, prefix, fuse):
    """All that the map holds is what the definition says."""
    tokens = scores.shape[1]
    images = [truth(row, k, prefix, fuse) for row in scores.float()]
    assert token_map.num_out == (len(images[0]) if images else prefix + k + fuse)
    assert token_map.dest.tolist() == [dest_of(slots, tokens) for slots in images]
    members = []
    for image, slots in enumerate(images):
        counts = [len(slot) for slot in slots]
        assert token_map.count[image].tolist() == counts
        assert token_map.begin[image].tolist() == [*itertools.accumulate(counts, initial=image * tokens)][:-1]
        rows = [image * tokens + token for slot in slots for token in slot]
        members += rows + [-1] * (tokens - len(rows))
    assert token_map.members.tolist() == members
    assert_views(token_map)
    for view in (token_map.dest, *token_map.views()):
        assert view.dtype == torch.int32


def drawn_scores(kind, images, tokens):
    """Scores that all differ, scores that mostly tie, or scores with NaN, infinities and zeros of both signs."""
    if kind == "different":
        return torch.stack([torch.randperm(tokens) for _ in range(images)]).float() / tokens - 0.5
    scores = torch.randint(-2, 3, (images, tokens)) / 2
    if kind == "special":
        values = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
        scores = torch.where(torch.rand(images, tokens) < 0.5, values[torch.randint(0, 4, (images, tokens))], scores)
    return scores


@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 197, *slow(64, 577, 1501)])
@pytest.mark.parametrize("prefix", [0, 1, *slow(2), 5])
@pytest.mark.parametrize("fuse", [False, True], ids=["drop", "fuse"])
def test_is_what_the_definition_says(device, tokens, prefix, fuse):
    prefix = min(prefix, tokens)
    free = tokens - prefix
    for kind in ("different", "ties", "special"):
        scores = drawn_scores(kind, 2, tokens)
        for k in {free // 3} if tokens > 100 else {0, min(1, free), free // 2, max(free - 1, 0), free}:
            token_map = tk.keep_topk(scores.to(device), k, num_prefix=prefix, fuse=fuse)
            assert_keeps(token_map, scores, k, prefix, fuse)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_any_dtype(device, dtype):
    for kind in ("different", "ties", "special"):
        scores = drawn_scores(kind, 3, 65).to(dtype)
        assert_keeps(tk.keep_topk(scores.to(device), 20, fuse=True, num_prefix=1), scores, 20, 1, True)


@pytest.mark.slow
def test_more_tokens_than_a_block_sorts_in_shared_memory(device):
    scores = drawn_scores("ties", 1, 40_001)
    for k, fuse in ((5, True), (20_000, False), (40_000, True)):
        assert_keeps(tk.keep_topk(scores.to(device), k, fuse=fuse, num_prefix=1), scores, k, 1, fuse)


@pytest.mark.slow
def test_more_images_than_a_processor_takes_at_once(device):
    scores = drawn_scores("ties", 300, 17)
    assert_keeps(tk.keep_topk(scores.to(device), 8, fuse=True, num_prefix=1), scores, 8, 1, True)


@pytest.mark.parametrize("value", [0.0, -0.0, math.nan, math.inf, -math.inf])
def test_of_equal_scores_the_lower_index_stays(device, value):
    scores = torch.full((2, 40), value, device=device)
    token_map = tk.keep_topk(scores, 7, num_prefix=2, fuse=True)
    assert token_map.dest.tolist() == [[*range(9), *[9] * 31]] * 2


def test_both_zeros_are_one_score_and_nan_is_the_least(device):
    scores = torch.tensor([[-0.0, 0.0, math.nan, -math.inf, -1.0, math.nan, math.inf]], device=device)
    kept = tk.keep_topk(scores, 7, num_prefix=0).members.tolist()
    assert kept == [6, 0, 1, 4, 2, 3, 5], "NaN is as low as -inf, so their order is that of their numbers"


def test_scores_of_the_prefix_do_not_matter(device):
    scores = torch.randn(2, 30)
    expected = tk.keep_topk(scores.to(device), 9, num_prefix=3)
    for value in (math.nan, math.inf, -math.inf):
        scores[:, :3] = value
        assert torch.equal(tk.keep_topk(scores.to(device), 9, num_prefix=3).dest, expected.dest)


def test_no_slot_is_fused_if_all_tokens_are_kept(device):
    scores = torch.randn(2, 9, device=device)
    fused, dropped = (tk.keep_topk(scores, 8, fuse=fuse, num_prefix=1) for fuse in (True, False))
    assert fused.num_out == dropped.num_out == 9
    assert torch.equal(fused.dest, dropped.dest)


def test_reads_strided_scores(device):
    base = torch.rand(2, 3, 50, device=device)
    views = {
        "rows apart": base[:, 1],
        "sliced": base[:, 0, 7:-5],
        "elements apart": base[:, 2, ::3],
        "backwards in memory": base[:, 0].t().contiguous().t(),
        "one row for all": base[:1, 0].expand(4, -1),
        "of one token": base[:, 0, 4:5],
    }
    for name, scores in views.items():
        k = scores.shape[1] // 2
        got = tk.keep_topk(scores, k, num_prefix=0, fuse=True)
        want = tk.keep_topk(scores.clone(memory_format=torch.contiguous_format), k, num_prefix=0, fuse=True)
        assert torch.equal(got.dest, want.dest), name
        assert_views(got)


def test_scores_get_no_gradient(device):
    scores = torch.randn(2, 9, device=device, requires_grad=True)
    x = torch.randn(2, 9, 4, device=device, requires_grad=True)
    tk.merge(x, tk.keep_topk(scores, 4, num_prefix=1)).sum().backward()
    assert scores.grad is None
    assert (x.grad.sum((1, 2)) == 20).all()


def test_no_images_and_no_tokens(device):
    for images, tokens, k, prefix in ((0, 9, 3, 1), (2, 0, 0, 0), (0, 0, 0, 0), (2, 1, 0, 1)):
        scores = torch.empty(images, tokens, device=device)
        for fuse in (False, True):
            token_map = tk.keep_topk(scores, k, num_prefix=prefix, fuse=fuse)
            assert token_map.dest.shape == (images, tokens)
            assert token_map.num_out == prefix + k + (fuse and prefix + k < tokens)
            assert token_map.count.shape == token_map.begin.shape == (images, token_map.num_out)
            assert_views(token_map)


def test_reproduces_the_published_evit(device):
    arrays, params = golden("evit_0.npz")
    x, attention = arrays["x"].to(device), arrays["cls_attn"].to(device)
    scores = torch.cat([attention.new_zeros(2, 1), attention], 1)
    kept = math.ceil(params["keep_rate"] * attention.shape[1])
    fused = tk.keep_topk(scores, kept, fuse=True, num_prefix=1)
    stays = fused.dest < 1 + kept
    y = tk.merge(x, fused, reduce="sum", weight=torch.where(stays, 1.0, scores))
    torch.testing.assert_close(y.cpu(), arrays["out"])
    dropped = tk.keep_topk(scores, kept, num_prefix=1)
    assert torch.equal(tk.merge(x, dropped, reduce="sum").cpu(), arrays["out_without_fuse"])
    for token_map in (fused, dropped):
        own = token_map.members.view(2, 20)[:, 1 : 1 + kept].cpu() - torch.tensor([[0], [20]])
        assert (own - 1).tolist() == arrays["kept_index"].tolist()


def test_a_backend_that_cannot_run_the_call_raises():
    with (
        tk.use_backend("cuda"),
        pytest.raises(RuntimeError, match=r'keep_topk: the backend "cuda" was requested .*reference'),
    ):
        tk.keep_topk(torch.randn(1, 9), 5, num_prefix=1)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda s: tk.keep_topk(s.tolist(), 3, num_prefix=1), TypeError, "scores must be a torch.Tensor, got list"),
        (lambda s: tk.keep_topk(s.int(), 3, num_prefix=1), TypeError, "scores must be float32.*got torch.int32"),
        (lambda s: tk.keep_topk(s.to_sparse(), 3, num_prefix=1), TypeError, "scores must be a dense"),
        (lambda s: tk.keep_topk(s[0], 3, num_prefix=1), ValueError, r"scores must be \(B, N\), got shape \(12,\)"),
        (
            lambda s: tk.keep_topk(s[..., None], 3, num_prefix=1),
            ValueError,
            r"scores must be \(B, N\), got shape \(2, 12, 1\)",
        ),
        (
            lambda s: tk.keep_topk(torch.empty(2, MAX_ROWS // 2 + 1, device="meta"), 3, num_prefix=1),
            ValueError,
            rf"scores may have at most {MAX_ROWS} entries, got shape \(2, {MAX_ROWS // 2 + 1}\)",
        ),
        (
            lambda s: tk.keep_topk(s, 12, num_prefix=1),
            ValueError,
            r"k must be at most N - num_prefix = 12 - 1 = 11, got 12",
        ),
        (lambda s: tk.keep_topk(s, 10, num_prefix=3), ValueError, "N - num_prefix = 12 - 3 = 9, got 10"),
        (lambda s: tk.keep_topk(s, 13, num_prefix=0), ValueError, "N - num_prefix = 12 - 0 = 12, got 13"),
        (lambda s: tk.keep_topk(s, -1, num_prefix=1), ValueError, "k must be at least 0, got -1"),
        (lambda s: tk.keep_topk(s, 3.0, num_prefix=1), TypeError, r"k must be an int, got float \(3\.0\)"),
        (lambda s: tk.keep_topk(s, True, num_prefix=1), TypeError, r"k must be an int, got bool \(True\)"),
        (lambda s: tk.keep_topk(s, 3, num_prefix=-2), ValueError, "num_prefix must be at least 0, got -2"),
        (lambda s: tk.keep_topk(s, 3, num_prefix=None), TypeError, "num_prefix must be an int, got NoneType"),
        (lambda s: tk.keep_topk(s, 0, num_prefix=13), ValueError, "num_prefix must be at most N = 12, got 13"),
        (lambda s: tk.keep_topk(s, 3, fuse=1, num_prefix=1), TypeError, "fuse must be True or False, got 1"),
        (lambda s: tk.keep_topk(s, 3, fuse=None, num_prefix=1), TypeError, "fuse must be True or False, got None"),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=rf"^tokred_kernels\.keep_topk: .*{words}"):
        call(torch.randn(2, 12))
