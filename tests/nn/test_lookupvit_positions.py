# SPDX-License-Identifier: MIT
"""Initial positions: waves along each dimension, which stay distinct after resizing."""

import math

import pytest
import torch

from tokred_kernels.models.imports import import_timm
from tokred_kernels.nn.lookupvit import LookupViT
from tokred_kernels.nn.lookupvit_positions import smooth_positions
from tokred_kernels.nn.lookupvit_resize import resize_tokens

timm = import_timm()


def test_two_dimensions_have_timms_waves():
    ours = smooth_positions((5, 7), 32)
    theirs = timm.layers.build_sincos2d_pos_embed([5, 7], 32)
    assert ours.shape == (1, 35, 32)
    apart = (ours[0][:, :, None] - theirs[:, None]).abs().amax(0)
    assert (apart.amin(0) < 1e-5).all()
    assert (apart.amin(1) < 1e-5).all()


@pytest.mark.parametrize(("grid", "dim"), [((3,), 8), ((4, 3), 30), ((2, 4, 3), 32)])
def test_every_dimension_has_as_many_channels(grid, dim):
    positions = smooth_positions(grid, dim).view(*grid, dim)
    waves = dim // (2 * len(grid))
    varying = []
    for axis in range(len(grid)):
        still = positions.narrow(axis, 0, 1).expand_as(positions)
        varying.append((positions != still).flatten(0, -2).any(0))
        assert varying[-1].sum() == 2 * waves
    assert (sum(own.int() for own in varying) <= 1).all()
    assert (positions != 0).flatten(0, -2).any(0).sum() == 2 * waves * len(grid)


def test_the_first_wave_has_a_length_of_two_pi():
    positions = smooth_positions((4,), 2)[0]
    places = torch.arange(4.0)
    torch.testing.assert_close(positions, torch.stack([places.sin(), places.cos()], 1))


def test_fewer_channels_than_waves_need_are_zero():
    assert not smooth_positions((2, 2), 3).any()


@pytest.mark.parametrize("settings", [{}, {"img_size": (4, 32, 24), "patch_size": (2, 8, 8), "grid": (1, 2, 2)}])
def test_a_model_starts_with_them_and_learns_them(settings):
    model = LookupViT(**{"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "grid": (2, 2), **settings})
    assert torch.equal(model.pos_embed, smooth_positions(model.lookup_grid, 32))
    assert model.pos_embed.requires_grad


def test_compressed_tokens_stay_as_far_apart_however_many_they_are_made_of():
    def spread(positions, length):
        small = resize_tokens(positions, (length, length), (5, 5))
        return ((small - small.mean(1, keepdim=True)).norm() / math.sqrt(small.numel())).item()

    few, many = (spread(smooth_positions((length, length), 64), length) for length in (8, 32))
    assert many == pytest.approx(few, rel=0.1)
    assert many > 2 * spread(smooth_positions((32, 32), 64)[:, torch.randperm(1024)], 32)
