# SPDX-License-Identifier: MIT
"""Hugging Face's models, patched, against timm's of the same weights, whose patches are tested against the papers."""

import method_settings
import pytest
import torch
from hf_models import SIDE, TIMM_NAMES, images, make, timm_twin

from tokred_kernels import calibrate_thresholds
from tokred_kernels.patching import patch

METHODS = method_settings.METHODS | {
    "tome": {"r": [5, 0, 7, 100]},
    "tome, sizes not in attention": {"r": 5, "prop_attn": False},
    "algm, a number": {"layers": (0, 2), "count": 4, "prop_attn": True},
    "evit, mean": {"layers": (1, 2), "keep_rate": 0.7, "importance": "mean", "fuse": False},
}
WITHOUT_CLASS_TOKEN = [name for name in METHODS if name not in ("dynamicvit", "evit", "diffrate")]
PAIRS = [
    (name, method) for name in TIMM_NAMES for method in (METHODS if name != "siglip, encoder" else WITHOUT_CLASS_TOKEN)
]

pytestmark = pytest.mark.usefixtures("one_thread")


def put(model, method):
    return patch(model, method.partition(",")[0], **METHODS[method])


def both(name, method):
    """Patch both models with the same method, and copy the predictors."""
    model = make(name).double()
    twin = timm_twin(name, model).double()
    put(model, method), put(twin, method)
    if method == "dynamicvit":
        inside = model.vit if name == "vit" else model
        for own, other in zip(inside.score_predictor.parameters(), twin.score_predictor.parameters(), strict=True):
            torch.nn.init.normal_(own, std=0.2)
            other.data.copy_(own)
    return model, twin


def pooled(outputs):
    return outputs["pooler_output" if "pooler_output" in outputs else "logits"]


# transformers has its angles in float32.
NEAR = {"rtol": 1e-6, "atol": 1e-6}


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_outputs_maps_and_sizes_are_the_same(name, method):
    (model, twin), x = both(name, method), images(dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(pooled(model(x)), twin(x), **NEAR)
    assert torch.equal(model.token_map.dest, twin.token_map.dest)
    assert model.token_map.num_out < model.token_map.num_tokens
    torch.testing.assert_close(model.token_sizes, twin.token_sizes, **NEAR)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_gradients_in_training_are_the_same(name, method):
    (model, twin), x = both(name, method), images(dtype=torch.float64)
    found = []
    for one in (model, twin):
        one.train()
        if name == "dinov3" and one is model:
            one.rope_embeddings.eval()  # moves positions at random
        torch.manual_seed(7)  # of the policies
        y = one(x)
        y = y if one is twin else pooled(y)
        loss = y.square().sum() + sum(decision.mean() for decision in one.token_decisions)
        loss.backward()
        projection = one.get_parameter(projection_of(name, timm=one is twin))
        found.append((y.detach(), projection.grad, one.token_decisions))
    (y, gradient, decisions), (y_twin, gradient_twin, decisions_twin) = found
    torch.testing.assert_close(y, y_twin, **NEAR)
    torch.testing.assert_close(gradient, gradient_twin.reshape(gradient.shape), rtol=1e-5, atol=1e-5)
    assert len(decisions) == len(decisions_twin) == (2 if method == "dynamicvit" else 0)
    for own, other in zip(decisions, decisions_twin, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_autocast_is_the_same(name):
    model, x = make(name), images()
    twin = timm_twin(name, model)
    put(model, "tome"), put(twin, "tome")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own, other = pooled(model(x)), twin(x)
    assert own.dtype == other.dtype
    torch.testing.assert_close(own.float(), other.float(), rtol=0.1, atol=0.1 * float(other.abs().max()))
    assert (model.token_sizes.dtype, model.token_map.num_out) == (torch.float32, twin.token_map.num_out)


@pytest.mark.parametrize("window", [None, (2, 3)])
@pytest.mark.parametrize("name", TIMM_NAMES)
def test_calibrated_thresholds_are_the_same(name, window):
    model = make(name).double()
    batches = [images(dtype=torch.float64) for _ in range(2)]
    settings = {"window": window, "progress": False}
    own, other = (calibrate_thresholds(one, batches, **settings) for one in (model, timm_twin(name, model).double()))
    assert own.layers.keys() == other.layers.keys()
    for layer in own.layers:
        torch.testing.assert_close(own.layers[layer], other.layers[layer], rtol=1e-6, atol=1e-6)


def projection_of(name, timm):
    """The weight of the patch embedding, which every gradient reaches."""
    if timm:
        return "patch_embed.proj.weight"
    return {
        "vit": "vit.embeddings.patch_embeddings.projection.weight",
        "dinov3": "embeddings.patch_embeddings.weight",
        "siglip, encoder": "embeddings.patch_embedding.weight",
    }[name]


def test_a_grid_that_is_no_square():
    model = make("vit, encoder", image_size=(SIDE, 2 * SIDE))
    patch(model, "algm", layers=(0,), threshold=-1.0, window=(3, 2))
    model(torch.randn(1, 3, SIDE, 2 * SIDE))
    grid = model.token_map.dest[0, 1:].reshape(6, 12)
    cells = grid.reshape(2, 3, 6, 2).transpose(1, 2).flatten(2)
    assert (cells == cells[..., :1]).all() and model.token_map.num_out == 1 + 12
