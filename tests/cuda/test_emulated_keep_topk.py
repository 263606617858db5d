# SPDX-License-Identifier: MIT
"""The CUDA kernel of keep_topk, run on the host, against the reference backend."""

import pytest
import torch
from emulated import SMALL_SHARED, assert_map, flat, poisoned, whole_numbers

from tokred_kernels.backends.reference import keep_topk

# As in keep_topk.cu: more candidates than these are sorted and not counted.
MOST_COUNTED = 512
# One token, few, ViTs', and past one round of a block; around where counting ends; all but the prefix around a load.
TOKENS = (1, 2, 3, 6, 9, 32, 197, 512, 513, 514, 577, 1025, 1500, 5000)
# Too little for an order of anything that is not counted: it goes where the outputs will be.
NO_SHARED = 8 * MOST_COUNTED + 128
SIZES = [
    (tokens, first, limit)
    for limit in (SMALL_SHARED, NO_SHARED)
    for tokens in TOKENS
    for first in (0, 1, 2, 5)
    if tokens >= first and (limit == SMALL_SHARED or tokens - first > MOST_COUNTED)
]


def check(emulator, scores, k, first, fuse, **options):
    images, tokens = scores.shape
    slots = first + k + fuse
    outputs = poisoned(images * tokens, images * tokens, images * slots, images * slots)
    integers = (scores.stride(0), images, tokens, first, k, fuse)
    emulator.call("keep_topk", integers, [flat(scores), *outputs], **options)
    assert_map(outputs, keep_topk.keep_topk(scores, k, first, fuse), slots)


def scores_of(kind, images, tokens):
    """Numbers of all sizes; few, so that most tie; and those that are in no order, or at its ends."""
    if kind == "any":
        return torch.randn(images, tokens) * 10.0 ** torch.randint(-20, 20, (images, tokens))
    scores = whole_numbers(images, tokens) / 2
    if kind == "special":
        values = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 0.0, 1e-45])
        scores = torch.where(torch.rand(images, tokens) < 0.6, values[torch.randint(0, 7, (images, tokens))], scores)
    return scores


@pytest.mark.parametrize("tokens,first,limit", SIZES)
def test_keep_topk(emulator, tokens, first, limit):
    free = tokens - first
    kinds = ("any", "ties", "special")
    for number, k in enumerate(sorted({0, min(1, free), free // 2, max(free - 1, 0), free})):
        scores = scores_of(kinds[number % 3], 2 if tokens < 1000 else 1, tokens)
        for fuse in (False, True):
            reverse = (number + fuse) % 2 == 1
            check(emulator, scores, k, first, fuse and k < free, shared_limit=limit, reverse=reverse)


# Counted, sorted in shared memory, sorted where the outputs will be.
WAYS = pytest.mark.parametrize(
    "tokens,limit", [(60, SMALL_SHARED), (700, SMALL_SHARED), (700, NO_SHARED)], ids=["counted", "sorted", "in place"]
)


@WAYS
@pytest.mark.parametrize("fuse", [False, True])
def test_every_kind_of_score_at_any_k(emulator, tokens, limit, fuse):
    for kind in ("any", "ties", "special"):
        scores = scores_of(kind, 3, tokens)
        for k in (1, 17, tokens - 3):
            check(emulator, scores, k, 2, fuse, shared_limit=limit, reverse=k == 17)


@WAYS
def test_all_scores_alike(emulator, tokens, limit):
    for value in (0.0, torch.nan, torch.inf, -torch.inf):
        check(emulator, torch.full((2, tokens), value), 9, 1, True, shared_limit=limit)


@WAYS
def test_scores_of_the_prefix_are_not_looked_at(emulator, tokens, limit):
    scores = scores_of("any", 2, tokens)
    scores[:, :3] = torch.tensor([torch.inf, torch.nan, -torch.inf])
    check(emulator, scores, 20, 3, True, shared_limit=limit)


@WAYS
def test_strided_scores(emulator, tokens, limit):
    scores = scores_of("ties", 3, tokens + 7)[:, 4:-3]
    check(emulator, scores, 11, 1, True, shared_limit=limit, offset=4)
    check(emulator, scores[:1].expand(3, -1), 11, 1, False, shared_limit=limit)


def test_more_scores_than_shared_memory_has_room_for(emulator):
    tokens = SMALL_SHARED // 8 + 2
    check(emulator, scores_of("ties", 1, tokens), tokens // 3, 1, True, shared_limit=SMALL_SHARED)


def test_a_fused_slot_with_nothing_in_it(emulator):
    for tokens in (5, 600):
        check(emulator, scores_of("ties", 2, tokens), tokens - 1, 1, True)


def test_without_images_or_tokens(emulator):
    check(emulator, torch.zeros(0, 9), 3, 1, True)
    check(emulator, torch.zeros(2, 0), 0, 0, False)
