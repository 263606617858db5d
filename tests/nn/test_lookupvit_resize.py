# SPDX-License-Identifier: MIT
"""Grids of tokens resized, against torch's interpolation."""

import pytest
import torch
import torch.nn.functional as F

from tokred_kernels.nn.lookupvit_resize import resize_tokens


@pytest.mark.parametrize("after", [(5, 7), (1, 1), (24, 3), (24, 20), (31, 40)])
def test_two_dimensions_are_resized_as_torch_does(after):
    x = torch.randn(2, 24 * 20, 3).double()
    expected = F.interpolate(x.transpose(1, 2).unflatten(2, (24, 20)), size=after, mode="bilinear", antialias=True)
    found = resize_tokens(x, (24, 20), after)
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2), rtol=1e-9, atol=1e-12)


def test_three_dimensions_are_resized_along_each():
    x = torch.randn(2, 6 * 4 * 5, 3).double()
    by_frame = resize_tokens(x.unflatten(1, (6, 20)).flatten(0, 1), (4, 5), (2, 3)).reshape(2, 6, 6 * 3)
    by_time = resize_tokens(by_frame, (6,), (2,)).reshape(2, 12, 3)
    torch.testing.assert_close(resize_tokens(x, (6, 4, 5), (2, 2, 3)), by_time, rtol=1e-9, atol=1e-12)


def test_every_token_counts_in_a_smaller_grid():
    x = torch.zeros(1, 24 * 24, 1, requires_grad=True)
    resize_tokens(x, (24, 24), (5, 5)).sum().backward()
    assert x.grad.min() > 0
    assert x.grad.sum().item() == pytest.approx(25)


def test_equal_grids_give_the_tokens_themselves():
    x = torch.randn(2, 12, 3)
    assert resize_tokens(x, (3, 4), (3, 4)) is x
