# SPDX-License-Identifier: MIT
import math

import pytest
import torch
from support import assert_views, dest_of, slow, window_members, window_slots

from tokred_kernels import backends
from tokred_kernels.ops.window_map import window_map
from tokred_kernels.windows import Windows


def call(score, windows, r, counts=None):
    """The map, on the backend in use."""
    return window_map(score, windows, r, backends.choose("window_similarity", score), counts)


def truth(score, windows, r):
    """`dest` of one image."""
    members = window_members(windows.first, windows[1:3], windows[3:])
    return dest_of(window_slots(score.tolist(), members, windows.first, windows.num_tokens(), r), windows.num_tokens())


def tied_scores(images, windows):
    """Few values, so that most windows tie, and some that never merge."""
    score = torch.randint(-2, 3, (images, windows.number())) / 2
    score[torch.rand(score.shape) < 0.1] = -math.inf
    return score


# As in test_window_similarity, and enough windows for more than one block of a sort.
SHAPES = [
    Windows(0, 1, 2, 1, 2),
    Windows(2, 6, 5, 2, 1),
    *slow((Windows(1, 14, 14, 2, 2),)),
    Windows(5, 7, 9, 2, 2),
    Windows(1, 9, 7, 4, 2),
    Windows(1, 5, 3, 5, 3),
    *slow((Windows(1, 65, 66, 1, 2),)),
]


@pytest.mark.parametrize("windows", SHAPES, ids=str)
def test_merges_the_highest_at_any_r(device, windows):
    score = tied_scores(3, windows)
    number = windows.number()
    for r in sorted({0, 1, number // 3, number - 1, number}):
        token_map = call(score.to(device), windows, r)
        assert token_map.dest.tolist() == [truth(image, windows, r) for image in score]
        assert token_map.num_out == windows.num_tokens() - r * (windows.size() - 1)
        assert token_map.packed is None
        assert_views(token_map)


@pytest.mark.parametrize("windows", SHAPES, ids=str)
def test_packed_images_each_merge_their_own_number(device, windows):
    score, number = tied_scores(4, windows), windows.number()
    counts = torch.tensor([number // 2, 0, number, 1], dtype=torch.int32)
    lengths = [windows.num_tokens() - r * (windows.size() - 1) for r in counts.tolist()]
    token_map = call(score.to(device), windows, 0, counts.to(device))
    assert token_map.packed.lengths == tuple(lengths)
    assert token_map.packed.cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(5)]
    assert token_map.num_out == sum(lengths)
    for b, r in enumerate(counts.tolist()):
        start = sum(lengths[:b])
        assert token_map.dest[b].tolist() == [start + slot for slot in truth(score[b], windows, r)]
    assert_views(token_map)


def test_a_tie_goes_to_the_lower_index(device):
    score = torch.tensor([[0.5, 0.7, 0.7, 0.5, -0.0, 0.0]], device=device)
    windows = Windows(1, 3, 4, 1, 2)
    merged = [call(score, windows, r).dest[0, 1::2].tolist() for r in range(7)]
    assert merged[1] == [2, 1, 4, 6, 8, 10]
    assert merged[3] == [3, 1, 2, 4, 6, 8]
    assert merged[5] == [3, 1, 2, 4, 5, 6], "there is one zero"
    assert merged[6] == [3, 1, 2, 4, 5, 6]


def test_reads_strided_scores(device):
    windows = Windows(1, 4, 4, 2, 2)
    score = torch.rand(4, 6, device=device).t()[::2]
    assert torch.equal(call(score, windows, 2).dest, call(score.contiguous(), windows, 2).dest)


def test_no_images(device):
    windows = Windows(1, 4, 4, 2, 2)
    nothing = torch.empty(0, 4, device=device)
    assert call(nothing, windows, 2).dest.shape == (0, 17)
    token_map = call(nothing, windows, 0, torch.empty(0, dtype=torch.int32, device=device))
    assert (token_map.dest.shape, token_map.num_out, token_map.packed.lengths) == ((0, 17), 0, ())
