# SPDX-License-Identifier: MIT
"""The analytic counts against torch's own counter, on the models as they run."""

import pytest
import torch

from tokred_kernels import flops, use_backend
from tokred_kernels.models.imports import import_timm
from tokred_kernels.patching import patch, unpatch

timm = import_timm()
VisionTransformer = timm.models.vision_transformer.VisionTransformer
VisionTransformerDistilled = timm.models.deit.VisionTransformerDistilled

TINY = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 10}
MODELS = {
    "vit": (VisionTransformer, {}),
    "distilled": (VisionTransformerDistilled, {}),
    "registers, no class token": (VisionTransformer, {"reg_tokens": 4, "class_token": False, "global_pool": "avg"}),
    "attention pool": (VisionTransformer, {"class_token": False, "global_pool": "map"}),
    "no pooling": (VisionTransformer, {"global_pool": ""}),
    "oblong": (VisionTransformer, {"img_size": (64, 40)}),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def make(name):
    kind, settings = MODELS[name]
    # torch's counter cannot follow a parameter that is a view under no_grad, as in the attention pool.
    return kind(**{**TINY, **settings}).eval().requires_grad_(False)


def counted(model, batch=2):
    images = torch.zeros(batch, 3, *model.patch_embed.img_size)
    with flops.counter(display=False) as counter:
        model(images)
    return counter.get_total_flops() / batch


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("r", [None, 0, 5, (6, -1), 100])
@pytest.mark.parametrize("name", MODELS)
def test_count_agrees_with_torchs_counter(name, r, backend):
    model = make(name)
    if r is not None:
        patch(model, "tome", r=r)
    with use_backend(backend):
        assert flops.count(model).total == pytest.approx(counted(model), rel=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vit_base_mci_224"])
def test_patches_embedded_by_a_network(name, training):
    model = patch(timm.create_model(name, num_classes=10).requires_grad_(False).eval(), "tome", r=8)
    expected = counted(model)
    state = {key: part.clone() for key, part in model.state_dict().items()}
    assert flops.count(model.train(training)).total == pytest.approx(expected, rel=1e-9)
    for key, part in model.state_dict().items():
        assert torch.equal(part, state[key]), key


ALGM = {
    "fixed": {"count": [9, 5]},
    "more than there are": {"count": 100},
    "windows only": {"layers": (2,), "count": 7},
    "nothing": {"count": 0},
    "batch": {"threshold": 0.0, "count": "batch"},
    "image": {"threshold": 0.0, "count": "image"},
    "rim": {"threshold": -1.0, "window": (3, 3), "count": "image"},
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("settings", ALGM.values(), ids=ALGM)
@pytest.mark.parametrize("name", MODELS)
def test_algm_agrees_with_torchs_counter(name, settings, backend):
    model = patch(make(name), "algm", **{"layers": (0, 2), **settings})
    images = torch.randn(3, 3, *model.patch_embed.img_size)
    with use_backend(backend):
        model(images)
        with flops.counter(display=False) as counter:
            model(images)
    found = flops.count(model)
    assert found.total == pytest.approx(counter.get_total_flops() / 3, rel=1e-6)  # every block is rounded
    assert found.tokens[-1] == model.token_map.count.numel() / 3
    assert len(found.tokens) == 4


def test_counts_that_depend_on_images_need_some():
    model = patch(VisionTransformer(**TINY, dynamic_img_size=True).eval(), "algm", layers=(0, 2), threshold=-1.0)
    with pytest.raises(RuntimeError, match=r"first run a forward with images of 65 tokens \(there was none\)"):
        flops.count(model)
    assert flops.count(model, tokens=[17, 17, 10]).tokens == (65, 17, 17, 10)
    model(torch.randn(2, 3, 32, 64))
    with pytest.raises(RuntimeError, match=r"images of 65 tokens \(the last one had images of 33\)"):
        flops.count(model)
    assert flops.count(model, (32, 64)).tokens[:3] == (33, 9, 9)


def test_a_forward_without_images_tells_nothing():
    model = patch(make("vit"), "algm", layers=(0, 2))
    model(torch.zeros(0, 3, 64, 64))
    with pytest.raises(RuntimeError, match="there was none"):
        flops.count(model)


def test_means_over_images_are_of_operations_and_not_of_tokens():
    model = patch(make("vit"), "algm", layers=(0,), threshold=0.9, count="image")
    plain = torch.cat([torch.full((1, 3, 64, 64), 20.0), 20 * torch.randn(1, 3, 64, 64)])
    model(plain)
    both = flops.count(model)
    model(plain[:1])
    merged = flops.count(model)
    assert both.tokens == (65, 41, 41, 41)
    assert merged.tokens == (65, 17, 17, 17)
    model(plain[1:])
    assert both.per_block[1] == (merged.per_block[1] + flops.count(model).per_block[1]) / 2


def test_tokens_are_those_that_the_model_has():
    model = patch(make("vit"), "tome", r=[7, 0, 60])
    model(torch.zeros(1, 3, 64, 64))
    # 64 of 65 tokens can merge; then at most (58 - 1) // 2 of 58.
    assert flops.count(model).tokens == (65, 58, 58, 30)
    assert flops.count(model).tokens[-1] == model.token_map.num_out


def test_a_real_model():
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    unpatched = flops.count(model)
    assert unpatched.macs / 1e9 == pytest.approx(4.6, abs=0.05)  # as the DeiT paper has it
    assert unpatched.tokens == (197,) * 13
    patched = flops.count(patch(model, "tome", r=13))
    assert patched.macs / 1e9 == pytest.approx(2.7, abs=0.06)  # as the ToMe paper has it
    assert len(patched.per_block) == 12
    assert patched.total == sum(patched.per_block) + patched.patch_embed + patched.head
    assert flops.count(unpatch(model)) == unpatched


def test_given_tokens_and_image_size():
    model = VisionTransformer(**TINY, dynamic_img_size=True).eval()
    assert flops.count(model, 32).tokens == (17,) * 4
    assert flops.count(model, (32, 64)).tokens == (33,) * 4
    assert flops.count(model, tokens=[60, 50, 40]).tokens == (65, 60, 50, 40)
    # Half of the tokens in the last MLP, and nothing else, is saved.
    saved = flops.count(model).total - flops.count(model, tokens=[65, 65, 45]).total
    assert saved == 20 * 2 * 2 * 64 * 256


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"img_size": 32}, ValueError, "accepts only images of"),
        ({"img_size": 0}, ValueError, "img_size must be at least 1"),
        ({"img_size": 1.5}, TypeError, "img_size must be an int"),
        ({"img_size": (1, 2, 3)}, ValueError, "one number or"),
        ({"tokens": [1]}, ValueError, "one number for each of 3 blocks"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        flops.count(make("vit"), **arguments)


def test_other_models():
    with pytest.raises(NotImplementedError, match="Linear is not supported"):
        flops.count(torch.nn.Linear(2, 2))
