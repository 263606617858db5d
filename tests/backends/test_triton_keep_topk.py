# SPDX-License-Identifier: MIT
"""Keeping the highest scores in Triton against the reference; conftest.py says where it runs."""

import math

import pytest
import torch
from support import assert_views

import tokred_kernels as tk

PREFIXES = (0, 1, 2, 5)


def assert_equals_reference(scores, k, prefix, fuse):
    got = tk.keep_topk(scores, k, num_prefix=prefix, fuse=fuse)
    with tk.use_backend("reference"):
        expected = tk.keep_topk(scores.cpu(), k, num_prefix=prefix, fuse=fuse)
    assert got.num_out == expected.num_out
    assert got.dest.dtype == torch.int32
    assert torch.equal(got.dest.cpu(), expected.dest)
    assert_views(got)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 17, 128])
def test_every_number_kept(device, tokens, fuse):
    scores = torch.randint(0, 9, (3, tokens), device=device) / 4  # most of them tie
    scores[1] = scores[1, 0].clone()  # CUDA refuses to copy a lone score onto itself
    scores[2] = torch.randn(tokens)
    for prefix in PREFIXES:
        for k in sorted({0, 1, (tokens - prefix) // 2, tokens - prefix - 1, tokens - prefix}):
            if 0 <= k <= tokens - prefix:
                assert_equals_reference(scores, k, prefix, fuse)


@pytest.mark.parametrize("fuse", [False, True])
def test_nan_comes_last(device, fuse):
    scores = torch.randn(4, 20, device=device)
    scores[0, 3::4] = math.nan
    scores[1] = math.nan
    scores[2, ::3], scores[2, 1::3] = -math.inf, math.nan
    scores[3, 5:9], scores[3, 2], scores[3, 11] = math.inf, -0.0, 0.0
    for k in (0, 5, 12, 18, 19):
        assert_equals_reference(scores, k, 1, fuse)
    nan_first = tk.keep_topk(torch.tensor([[math.nan, 1.0, math.nan, 2.0]], device=device), 3, num_prefix=0)
    assert nan_first.dest.tolist() == [[2, 1, -1, 0]]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("tokens", [129, 130, 1025, 1030])  # around a block, and the most that one program ranks
def test_many_tokens(device, tokens, fuse, monkeypatch):
    from tokred_kernels.backends.triton import keep_topk
    from tokred_kernels.backends.triton.configs import SelectConfig

    monkeypatch.setattr(keep_topk, "SCAN_CONFIG", SelectConfig(256, 8, 4))  # several blocks of an image
    scores = torch.randint(0, 100, (2, tokens), device=device).float()
    assert_equals_reference(scores, tokens // 3, 1, fuse)


def test_scores_of_the_prefix_are_not_looked_at(device):
    scores = torch.randn(2, 9, device=device)
    expected = tk.keep_topk(scores, 3, num_prefix=2).dest
    for value in (math.nan, math.inf, -math.inf):
        scores[:, :2] = value
        assert torch.equal(tk.keep_topk(scores, 3, num_prefix=2).dest, expected)


def test_reads_scores_as_they_lie(device):
    dense = torch.randn(3, 12, device=device)
    apart = torch.randn(3, 2, 12, device=device)
    apart[:, 1] = dense
    for scores in (apart[:, 1], dense.t().contiguous().t(), dense[:1].expand(3, 12), dense[:, 3:]):
        expected = tk.keep_topk(scores.contiguous(), 4, num_prefix=1)
        for one, other in zip(tk.keep_topk(scores, 4, num_prefix=1).views(), expected.views(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_keep(device, shape):
    got = tk.keep_topk(torch.randn(shape, device=device), 0, num_prefix=0)
    assert got.num_out == 0
    assert tuple(got.dest.shape) == shape
    assert (got.dest == -1).all()
    assert_views(got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_any_floating_dtype(device, dtype):
    assert_equals_reference(torch.randn(2, 31, device=device).to(dtype), 7, 1, True)
