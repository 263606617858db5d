# SPDX-License-Identifier: MIT
"""The linear segmenter, on plain encoders and on those that merge their tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokred_kernels import unmerge
from tokred_kernels.models.imports import import_timm
from tokred_kernels.nn.segmenter import LinearSegmenter
from tokred_kernels.patching import patch

VisionTransformer = import_timm().models.vision_transformer.VisionTransformer
CLASSES = 5
METHODS = {
    "unpatched": None,
    "tome": ("tome", {"r": 3}),
    "algm, batch": ("algm", {"layers": (0, 2), "threshold": 0.0, "count": "batch"}),
    "algm, image": ("algm", {"layers": (0, 2), "threshold": 0.0, "count": "image"}),
    "algm, numbers": ("algm", {"layers": (0, 2), "count": [3, 4]}),
}


def make(method=None, **settings):
    """A ViT of 4 blocks with tokens that are similar enough to merge."""
    settings = {"img_size": (48, 64), "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, **settings}
    encoder = VisionTransformer(num_classes=0, **settings).eval()
    return encoder if METHODS.get(method) is None else patch(encoder, METHODS[method][0], **METHODS[method][1])


def images(batch=2, height=48, width=64):
    """Images of different contrast."""
    return torch.randn(batch, 3, height, width) * torch.linspace(0.1, 1, batch).view(-1, 1, 1, 1)


class Rows(nn.Module):
    """A token-wise decoder that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 7), nn.GELU(), nn.Linear(7, CLASSES))

    def forward(self, x):
        self.given = tuple(x.shape)
        return self.layers(x)


class Grid(nn.Module):
    """A decoder that looks at neighbours, and gives twice the resolution."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(24, CLASSES, 3, padding=1)

    def forward(self, x):
        self.given = tuple(x.shape)
        return F.interpolate(self.conv(x), scale_factor=2)


def grid_of(encoder, x):
    """The final tokens, unmerged, as (B, C, h, w)."""
    tokens = encoder.forward_features(x)
    if hasattr(encoder, "token_map"):
        tokens = unmerge(tokens, encoder.token_map)
    grid = encoder.patch_embed.dynamic_feat_size(x.shape[2:])
    return tokens[:, encoder.num_prefix_tokens :].reshape(len(x), *grid, -1).permute(0, 3, 1, 2)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": ""}], ids=["class", "registers", "none"]
)
def test_scores_are_those_of_the_unmerged_tokens(method, settings):
    encoder = make(method, **settings)
    segmenter = LinearSegmenter(encoder, CLASSES).eval()
    x = images()
    grid = grid_of(encoder, x)
    head = segmenter.decoder.head
    scores = torch.einsum("bchw,kc->bkhw", grid, head.weight) + head.bias.view(1, -1, 1, 1)
    wanted = F.interpolate(scores, size=(48, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(segmenter(x), wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("method", [name for name in METHODS if name != "unpatched"])
def test_a_token_wise_decoder_runs_on_merged_tokens(method):
    encoder = make(method)
    segmenter = LinearSegmenter(encoder, CLASSES, decoder=Rows()).eval()
    x = images()
    scores = segmenter(x)
    token_map = encoder.token_map
    assert segmenter.decoder.given == (*token_map.out_shape, 24)
    assert segmenter.decoder.given[-2] < (49 * 2 if token_map.packed else 49)
    wanted = segmenter.decoder(grid_of(encoder, x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    wanted = F.interpolate(wanted, size=(48, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_convolution_runs_on_the_unmerged_grid(method):
    encoder = make(method)
    segmenter = LinearSegmenter(encoder, CLASSES, decoder=Grid(), token_wise=False).eval()
    x = images()
    scores = segmenter(x)
    assert segmenter.decoder.given == (2, 24, 6, 8)
    wanted = F.interpolate(segmenter.decoder(grid_of(encoder, x)), (48, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_every_image_is_as_if_alone():
    segmenter = LinearSegmenter(make("algm, image"), CLASSES).eval()
    x = images(3)
    together = segmenter(x)
    assert len(set(segmenter.encoder.token_map.packed.lengths)) > 1
    torch.testing.assert_close(together, torch.cat([segmenter(one[None]) for one in x]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("method", ["unpatched", "algm, image"])
def test_images_of_any_size_with_a_padding_encoder(method):
    encoder = make(method, dynamic_img_size=True, dynamic_img_pad=True)
    segmenter = LinearSegmenter(encoder, CLASSES).eval()
    x = images(height=33, width=47)
    scores = segmenter(x)
    assert scores.shape == (2, CLASSES, 33, 47)
    torch.testing.assert_close(scores, segmenter(F.pad(x, (0, 1, 0, 7)))[..., :33, :47])
    assert segmenter(images(1, 9, 70)).shape == (1, CLASSES, 9, 70)


@torch.no_grad()
def test_rows_and_columns_are_in_place():
    """A token that is its own patch's mean colour: each pixel's scores are the colour around it."""
    encoder = make()
    encoder.forward_features = lambda x: torch.cat(
        [torch.zeros(len(x), 1, 3), F.avg_pool2d(x, 8).flatten(2).transpose(1, 2)], 1
    )
    encoder.embed_dim = 3
    segmenter = LinearSegmenter(encoder, 3)
    segmenter.decoder.head.weight.copy_(torch.eye(3))
    colors = torch.rand(1, 3, 6, 8)
    scores = segmenter(colors.repeat_interleave(8, 2).repeat_interleave(8, 3))
    wanted = F.interpolate(colors, size=(48, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(scores, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_learns(method):
    segmenter = LinearSegmenter(make(method), CLASSES).train()
    loss = F.cross_entropy(segmenter(images()), torch.randint(CLASSES, (2, 48, 64)))
    loss.backward()
    still = [name for name, value in segmenter.named_parameters() if value.grad is None or not value.grad.any()]
    assert [name for name in still if "k.bias" not in name] == []


def test_decoders_of_published_segmenters_load():
    segmenter = LinearSegmenter(make(), 150)
    published = {"decoder.head.weight": torch.randn(150, 24), "decoder.head.bias": torch.randn(150)}
    missing, unexpected = segmenter.load_state_dict(published, strict=False)
    assert unexpected == []
    assert all(name.startswith("encoder.") for name in missing)
    assert torch.equal(segmenter.decoder.head.weight, published["decoder.head.weight"])
    fresh = LinearSegmenter(make(), 150).decoder.head
    assert not fresh.bias.any()
    assert fresh.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_tokens_that_are_dropped_leave_no_grid():
    segmenter = LinearSegmenter(make(patch_drop_rate=0.5), CLASSES)
    with pytest.raises(ValueError, match="a token for each of 6 x 8 patches, got 24; patch dropout"):
        segmenter.train()(images())
    assert segmenter.eval()(images()).shape == (2, CLASSES, 48, 64)


def test_maps_that_are_not_kept():
    segmenter = LinearSegmenter(patch(make(), "tome", r=3, trace=False), CLASSES)
    with pytest.raises(AttributeError, match="patch it with trace=True"):
        segmenter(images())


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({}, (48, 72), r"images must be of \(48, 64\) pixels, got \(48, 72\); .* dynamic_img_size=True"),
        ({"dynamic_img_size": True}, (48, 70), r"the patch size \(8, 8\) divides, got \(48, 70\); .*img_pad=True"),
        ({"dynamic_img_size": True}, (47, 64), r"the patch size \(8, 8\) divides, got \(47, 64\)"),
    ],
)
def test_images_of_a_wrong_size(settings, size, message):
    with pytest.raises(ValueError, match=message):
        LinearSegmenter(make(**settings), CLASSES)(images(1, *size))


def test_images_that_are_none():
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got shape \(3, 48, 64\)"):
        LinearSegmenter(make(), CLASSES)(images()[0])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"encoder": nn.Linear(3, 3)}, TypeError, "encoder must be a timm VisionTransformer or Eva, got Linear"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int, got float"),
        ({"decoder": torch.relu}, TypeError, r"decoder must be a torch\.nn\.Module, got builtin_function_or_method"),
        ({"token_wise": None}, TypeError, "token_wise must be True or False, got None"),
        ({"token_wise": False}, ValueError, "token_wise must be True without a decoder"),
    ],
)
def test_refusals(settings, error, message):
    settings = {"encoder": make(), "num_classes": CLASSES, **settings}
    with pytest.raises(error, match=message):
        LinearSegmenter(**settings)


@pytest.mark.parametrize(("decoder", "token_wise"), [(nn.Linear(24, 3), True), (nn.Conv2d(24, 3, 1), False)])
def test_a_decoder_of_other_classes(decoder, token_wise):
    segmenter = LinearSegmenter(make(), CLASSES, decoder=decoder, token_wise=token_wise)
    with pytest.raises(ValueError, match="decoder must give num_classes = 5 channels, got shape"):
        segmenter(images())


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("method", ["unpatched", "tome", "algm, numbers"])
def test_compiles_in_one_graph(method):
    segmenter = LinearSegmenter(make(method), CLASSES).eval()
    x = images()
    compiled = torch.compile(segmenter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), segmenter(x))
