# SPDX-License-Identifier: MIT
"""Patched models where every image keeps its own count: each comes out as if it had come alone."""

import pytest
import torch
from algm_models import MODELS, TINY, VisionTransformer, images, make, some, vit
from torch import nn
from written_out import block_gradients

import tokred_kernels as tk
from tokred_kernels import unmerge, use_backend
from tokred_kernels.models.state import TokenState
from tokred_kernels.patching import patch, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


def alone(model, x, **settings):
    """Tokens, classes, sizes and dense grid of each image by itself."""
    patch(model, "algm", **settings)
    results = []
    for image in x:
        tokens = model.forward_features(image[None])
        results.append((tokens, model.forward_head(tokens), model.token_sizes, unmerge(tokens, model.token_map)))
    unpatch(model)
    return results


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("prop_attn", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_each_image_comes_out_as_if_alone(name, prop_attn, backend):
    model, x = make(name), images(5)
    settings = some(model, x, layers=(0, 1, 3), prop_attn=prop_attn)
    with use_backend(backend), torch.no_grad():
        tokens, classes, sizes, grids = zip(*alone(model, x, **settings), strict=True)
        patch(model, "algm", **settings, count="image")
        packed = model.forward_features(x)
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(packed, torch.cat(tokens, 1)[0], **close)
        torch.testing.assert_close(model.forward_head(packed), torch.cat(classes), **close)
        torch.testing.assert_close(model(x), torch.cat(classes), **close)
        assert torch.equal(model.token_sizes, torch.cat(sizes, 1)[0])
        assert model.token_map.packed.lengths == tuple(part.shape[1] for part in tokens)
        assert len(set(model.token_map.packed.lengths)) > 1  # or nothing was tested
        torch.testing.assert_close(unmerge(packed, model.token_map), torch.cat(grids), **close)


@pytest.mark.parametrize("prop_attn", [False, True])
@pytest.mark.parametrize("include_prefix", [False, True])
@pytest.mark.parametrize("pool", ["token", "avg", "avgmax", "max", "map", ""])
def test_packed_pools_are_those_of_each_image_alone(pool, include_prefix, prop_attn):
    model = make("registers", global_pool=pool, pool_include_prefix=include_prefix)
    x = images(4)
    settings = some(model, x, prop_attn=prop_attn)
    with torch.no_grad():
        expected = torch.cat(
            [classes[0] if pool == "" else classes for _, classes, _, _ in alone(model, x, **settings)]
        )
        torch.testing.assert_close(patch(model, "algm", **settings, count="image")(x), expected, rtol=1e-4, atol=1e-5)


def test_packed_pools_have_the_gradients_of_each_image_alone():
    for pool in ("avg", "avgmax", "max", "map"):
        model, x = make("registers", global_pool=pool), images()
        settings = some(model, x)
        expected = block_gradients(
            model, sum(classes.square().sum() for _, classes, _, _ in alone(model, x, **settings))
        )
        found = block_gradients(model, patch(model, "algm", **settings, count="image")(x).square().sum())
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_packed_attention_without_the_fused_kernel_agrees():
    model, x = make(), images()
    expected = patch(model, "algm", **some(model, x), count="image", prop_attn=True)(x)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_gate_sees_packed_tokens():
    model, x = make(), images()
    for block in model.blocks:
        block.attn = vit.Attention(48, 3, gated=True)
    settings = some(model, x)
    expected = torch.cat([classes for _, classes, _, _ in alone(model, x, **settings)])
    torch.testing.assert_close(patch(model, "algm", **settings, count="image")(x), expected, rtol=1e-4, atol=1e-5)


def test_drop_path_drops_whole_packed_images():
    model = VisionTransformer(**TINY, drop_path_rate=0.5).train()
    patch(model, "algm", layers=(0,), threshold=0.0, count="image")
    seen = []
    model.blocks[3].drop_path2.register_forward_hook(lambda module, args, y: seen.append(y))
    model(images(64))
    (kept,) = seen
    assert kept.shape == (64, 1)  # one draw an image
    assert set(kept.unique().tolist()) == {0.0, 2.0}

    # A block whose attention adds ones alone: the rows of an image are dropped together, and those kept are scaled.
    block, (x, packing) = model.blocks[3], packed_ones([3, 1, 4, 1, 5] * 8)
    nn.init.zeros_(block.attn.proj.weight), nn.init.ones_(block.attn.proj.bias)
    nn.init.zeros_(block.mlp.fc2.weight), nn.init.zeros_(block.mlp.fc2.bias)
    y, _, _ = block(x, TokenState(packing=packing))
    for rows in y.split(packing.lengths):
        assert rows.unique().tolist() in ([1.0], [3.0])
    assert y.unique().tolist() == [1.0, 3.0]


def packed_ones(lengths):
    return torch.ones(sum(lengths), 48), tk.Packing.of(tuple(lengths), torch.device("cpu"))


def test_packed_tokens_of_another_forward_are_refused():
    model, x = make(), images()
    settings = some(model, x)
    tokens = patch(model, "algm", **settings, count="image").forward_features(x)
    with pytest.raises(ValueError, match=rf"last forward, which was {len(tokens)} tokens, got shape \(7, 48\)"):
        model.forward_head(tokens[:7])
    unpatch(model)
    patch(model, "algm", **settings).forward_features(x)
    with pytest.raises(ValueError, match="which was none that are packed"):
        model.forward_head(tokens)
    assert model.forward_head(torch.randn(2, 37, 48)).shape == (2, 5)  # others, (B, N, C), are taken as they are
