# SPDX-License-Identifier: MIT

import pytest
import torch
from support import (
    COSINE_BAND,
    DTYPES,
    assert_follows,
    assert_views,
    cosines,
    dest_of,
    exact_tokens,
    golden,
    match_slots,
    partners,
    slow,
)

import tokred_kernels as tk
from tokred_kernels.partition import prefix_and_rest


def test_reproduces_the_authors_code(device):
    arrays, params = golden("diffrate_merge_0.npz")
    x, size = arrays["x"].to(device), arrays["size"].to(device)
    kept = params["kept"]
    token_map, similarity = tk.importance_match(x, kept, class_token=params["class_token"])
    torch.testing.assert_close(similarity.cpu(), arrays["node_max"])
    torch.testing.assert_close(tk.merge(x, token_map).cpu(), arrays["merged_mean"])
    # DiffRate scales the size of a token that joins by its similarity.
    scaled = torch.cat([size[:, :kept], size[:, kept:] * similarity[..., None]], 1)
    torch.testing.assert_close(tk.merge(scaled, token_map, reduce="sum").cpu(), arrays["merged_size"])


@pytest.mark.parametrize("tokens,kept", [(2, 1), (3, 2), (17, 9), (60, 59), *slow((197, 100), (197, 6))])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_is_what_the_definition_says(device, tokens, kept, prefix):
    if prefix >= kept:
        pytest.skip("another test covers the case without a destination")
    for channels, dtype in zip((1, 16, 64), DTYPES, strict=True):
        metric = exact_tokens(2, tokens, channels)
        token_map, similarity = tk.importance_match(metric.to(device, dtype), kept, num_prefix=prefix)
        assert token_map.num_out == kept
        assert similarity.dtype == torch.float32
        for image in range(2):
            best = partners(cosines(metric[image]), range(kept, tokens), range(prefix, kept))
            slots = match_slots(best, range(prefix, kept), tokens - kept, lead=range(prefix))
            assert token_map.dest[image].tolist() == dest_of(slots, tokens)
            assert similarity[image].tolist() == [score for score, _ in best.values()]
        assert_views(token_map)


@pytest.mark.parametrize("tokens,channels", [(60, 3), *slow((197, 385), (1025, 64))])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_is_right_for_any_values(device, tokens, channels, dtype):
    metric = torch.randn(2, tokens, channels).to(dtype)
    kept = tokens * 2 // 3
    token_map, similarity = tk.importance_match(metric.to(device), kept, class_token=True)
    assert_follows(token_map, metric, prefix_and_rest(tokens, kept, 1))
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    exact = (unit[:, kept:] @ unit[:, 1:kept].transpose(1, 2)).max(-1).values
    assert (similarity.cpu() - exact).abs().max() <= COSINE_BAND


def test_the_class_token_is_a_prefix_of_one(device):
    metric = torch.randn(2, 20, 8, device=device)
    metric[:, 0] = metric[:, 15]  # what would join it if it could
    flagged, numbered = (tk.importance_match(metric, 9, **how) for how in ({"class_token": True}, {"num_prefix": 1}))
    free, _ = tk.importance_match(metric, 9)
    assert torch.equal(flagged[0].dest, numbered[0].dest)
    assert torch.equal(flagged[1], numbered[1])
    assert (flagged[0].dest[:, 15] != 0).all()
    assert (free.dest[:, 15] == 0).all()


def test_keys_of_all_heads_are_averaged(device):
    keys = torch.randn(2, 33, 3, 4, 16, device=device)[:, :, 1].transpose(1, 2)
    got, want = (tk.importance_match(m, 20) for m in (keys, keys.mean(1)))
    assert torch.equal(got[0].dest, want[0].dest)
    torch.testing.assert_close(got[1], want[1])


def test_keeping_all_tokens_is_the_identity(device):
    metric = torch.randn(2, 7, 4, device=device)
    for kept in (7, 8, 1000):
        token_map, similarity = tk.importance_match(metric, kept, class_token=True)
        assert token_map.dest.tolist() == [list(range(7))] * 2
        assert (similarity.shape, similarity.dtype) == ((2, 0), torch.float32)
        assert similarity.device == metric.device


def test_empty_batch_and_strided_metrics(device):
    token_map, similarity = tk.importance_match(torch.randn(0, 12, 4, device=device), 5)
    assert (token_map.dest.shape, token_map.num_out, similarity.shape) == ((0, 12), 5, (0, 7))
    metric = torch.randn(2, 4, 12, device=device, requires_grad=True).transpose(1, 2)
    got, want = (tk.importance_match(m, 5) for m in (metric, metric.detach().contiguous()))
    assert torch.equal(got[0].dest, want[0].dest)
    assert not got[1].requires_grad


def test_a_backend_that_cannot_run_the_call_raises():
    with tk.use_backend("cuda"), pytest.raises(RuntimeError, match=r'"cuda" was requested .*can: reference, cpu'):
        tk.importance_match(torch.randn(1, 9, 4), 5)


@pytest.mark.parametrize(
    "call,error,words",
    [
        (lambda m: tk.importance_match(m, 0), ValueError, "num_kept must be at least 1, for 12 of 12 tokens .*got 0"),
        (lambda m: tk.importance_match(m, 1, class_token=True), ValueError, "num_kept must be at least 2, for 11 of"),
        (lambda m: tk.importance_match(m, 5, num_prefix=5), ValueError, "num_kept must be at least 6, for 7 of 12"),
        (lambda m: tk.importance_match(m, -1), ValueError, "num_kept must be at least 0, got -1"),
        (lambda m: tk.importance_match(m, 5.0), TypeError, "num_kept must be an int, got float"),
        (lambda m: tk.importance_match(m, 5, num_prefix=-1), ValueError, "num_prefix must be at least 0, got -1"),
        (lambda m: tk.importance_match(m, 5, num_prefix=1, class_token=True), ValueError, "num_prefix or class_token"),
        (lambda m: tk.importance_match(m[0], 5), ValueError, r"metric must be \(B, N, D\).*\(12, 4\)"),
        (lambda m: tk.importance_match(m.int(), 5), TypeError, "metric must be float32.*int32"),
    ],
)
def test_bad_input_names_the_argument(call, error, words):
    with pytest.raises(error, match=rf"^tokred_kernels\.importance_match: .*{words}"):
        call(torch.randn(2, 12, 4))
