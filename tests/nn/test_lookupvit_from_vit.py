# SPDX-License-Identifier: MIT
"""A LookupViT made of a timm ViT: which weights are taken, what it computes first, and that it fine-tunes."""

import copy
import logging

import pytest
import torch
from algm_models import TINY, VisionTransformer, VisionTransformerDistilled, images, make, timm
from torch import nn

from tokred_kernels.nn.lookupvit import LookupViT, lookup_loss
from tokred_kernels.nn.lookupvit_resize import resize_tokens
from tokred_kernels.patching import patch, unpatch

GRID = (3, 2)
SOURCES = {
    "vit": {},
    "mean pooling": {"class_token": False, "global_pool": "avg"},
    "class token without position": {"no_embed_class": True},
    "layer scale, no bias, other widths": {"init_values": 0.5, "qkv_bias": False, "mlp_ratio": 2.5},
    "oblong, dynamic": {"img_size": (48, 32), "dynamic_img_size": True},
    "no head": {"num_classes": 0},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def copied(source):
    """By the name of the new parameter, the ViT's tensor that it must equal."""
    dim = source.embed_dim
    prefix = 0 if source.no_embed_class else source.num_prefix_tokens
    final = "norm" if isinstance(source.norm, nn.LayerNorm) else "fc_norm"
    expected = {}
    for name, value in source.named_parameters():
        part, _, rest = name.partition(".")
        if part == "cls_token":
            continue
        if part == "pos_embed":
            expected[name] = value[:, prefix:]
        elif part in (final, "head"):
            ours = "norm" if part == final else part
            expected[f"{ours}.{rest}"] = expected[f"{ours}_lookup.{rest}"] = value
        else:
            expected[name] = value
        if ".norm1." in name:
            expected[name.replace("norm1", "gather.norm_p")] = value
            expected[name.replace("norm1", "gather.norm_l")] = value
        if ".ls1." in name:
            expected[name.replace("ls1", "ls_gather")] = value
        if ".attn.proj." in name:
            expected[name.replace("attn.proj", "gather.proj")] = value
        if ".attn.qkv." in name:
            expected[name.replace("attn.qkv", "gather.q")] = value[:dim]
            expected[name.replace("attn.qkv", "gather.kv")] = value[dim:]
    return expected


@pytest.mark.parametrize("name", SOURCES)
def test_weights_that_correspond_are_taken(name):
    source = make(**SOURCES[name])
    before = copy.deepcopy(source.state_dict())
    model = LookupViT.from_vit(source, grid=GRID)
    ours, expected = dict(model.named_parameters()), copied(source)
    assert set(model.taken) == set(expected)
    for key, value in expected.items():
        assert torch.equal(ours[key], value), key
        assert ours[key].data_ptr() != value.data_ptr()
    assert sorted((*model.taken, *model.fresh)) == sorted(ours)
    assert {part for key in model.fresh for part in key.split(".")[2:-1]} <= {
        *("scatter", "ls_scatter", "norm", "v", "norm_lookup", "mlp_lookup", "ls_lookup", "fc1", "fc2")
    }
    for key, value in source.state_dict().items():
        assert torch.equal(value, before[key])


def test_settings_are_the_models():
    source = make(img_size=(48, 32), dynamic_img_size=True, init_values=0.1).double().train()
    model = LookupViT.from_vit(
        source, grid=GRID, grids=[(1, 1), (3, 2)], lookup_ratio=4, scatter_proj=True, drop_path_rate=0.2
    )
    assert type(model) is LookupViT
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert (model.img_size, model.lookup_grid, model.grid) == ((48, 32), (6, 4), GRID)
    assert (model.grids, model.dynamic_img_size, model.num_classes) == (((1, 1), (3, 2)), True, 5)
    assert len(model.blocks) == 4
    last = model.blocks[-1]
    assert (last.attn.num_heads, last.mlp_lookup.fc1.out_features) == (3, 12)
    assert last.drop_path.rate == pytest.approx(0.2)
    assert torch.equal(last.ls_scatter.gamma, torch.ones(48).double())
    assert last.norm1.eps == source.blocks[0].norm1.eps
    assert not LookupViT.from_vit(source.eval(), grid=GRID).training


def attend(block, z_p, z_l):
    """The block's attention from some tokens to others."""
    heads, attention = block.attn.num_heads, block.attn
    (q, _, _), (_, k, v) = (attention.qkv(block.norm1(z)).chunk(3, -1) for z in (z_p, z_l))
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return attention.proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("scatter_proj", [False, True])
def test_the_first_forward_is_the_vits_but_for_a_second_attention(name, scatter_proj):
    source = make(**SOURCES[name]).double()
    size = source.patch_embed.img_size
    model, x = LookupViT.from_vit(source, grid=GRID, scatter_proj=scatter_proj), images(2, size).double()
    prefix = 0 if source.no_embed_class else source.num_prefix_tokens
    with torch.no_grad():
        lookup = source.patch_embed(x).flatten(1, -2) + source.pos_embed[:, prefix:]
        expected = resize_tokens(lookup, (size[0] // 8, size[1] // 8), GRID)
        for block in source.blocks:
            expected = block(expected + block.ls1(attend(block, expected, lookup)))
        z_p, z_l = model.forward_features(x)
        norm = source.norm if isinstance(source.norm, nn.LayerNorm) else source.fc_norm
        torch.testing.assert_close(z_p, norm(expected), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(z_l, norm(lookup), rtol=1e-9, atol=1e-9)
        logits = (source.head(z_p.mean(1)) + source.head(z_l.mean(1))) / 2
        torch.testing.assert_close(model(x), logits, rtol=1e-9, atol=1e-9)


def test_it_fine_tunes():
    source, x, labels = make(), images(8), torch.arange(8) % 5
    model = LookupViT.from_vit(source.train(), grid=GRID, grids=[GRID, (2, 2)])
    fresh = {name: value.detach().clone() for name, value in model.named_parameters() if name in model.fresh}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = lookup_loss(model(x, GRID), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(not torch.equal(model.get_parameter(name), value) for name, value in fresh.items())
    out = model.eval()(x)
    assert out.isfinite().all()
    assert not torch.allclose(out, source.eval()(x))


def test_it_says_what_it_took(caplog):
    with caplog.at_level(logging.INFO, logger="tokred_kernels"):
        model = LookupViT.from_vit(make(), grid=GRID)
    assert f"took {len(model.taken)} parameters from the VisionTransformer" in caplog.text
    assert f"and {len(model.fresh)} are new" in caplog.text


# --- by `patch`


def test_patch_gives_the_new_model_and_leaves_the_old_one():
    source, x = make(), images()
    expected = source(x)
    model = patch(source, "lookupvit", grid=GRID)
    assert type(model) is LookupViT
    assert model.grid == GRID
    assert type(source) is VisionTransformer
    assert torch.equal(source(x), expected)
    for one in (source, model):
        with pytest.raises(ValueError, match="is not patched"):
            unpatch(one)
    patch(source, "tome", r=2)
    with pytest.raises(ValueError, match="already patched"):
        patch(source, "lookupvit", grid=GRID)


def test_patch_refuses_other_settings():
    with pytest.raises(TypeError, match=r'a setting of "lookupvit" must be one of grid, grids, .*, got r'):
        patch(make(), "lookupvit", grid=GRID, r=2)
    with pytest.raises(TypeError, match="needs the setting grid"):
        patch(make(), "lookupvit")


# --- what is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": (7, 2)}, ValueError, r"grid must be at most the lookup grid \(6, 6\)"),
        ({"grid": (2, 2, 2)}, ValueError, "grid must have 2 numbers"),
        ({"grid": GRID, "grids": [(7, 7)]}, ValueError, "each of grids must be at most"),
        ({"grid": GRID, "lookup_ratio": 0}, ValueError, "lookup_ratio must be above 0"),
        ({"grid": GRID, "scatter_proj": 1}, TypeError, "scatter_proj must be True or False, got 1"),
    ],
    ids=str,
)
def test_settings_that_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        LookupViT.from_vit(make(), **change)


def plain_embed(**given):
    return timm.layers.PatchEmbed(**{**given, "bias": True})


REFUSED = {
    "register tokens": {"reg_tokens": 4},
    "no learned positions": {"pos_embed": "none"},
    "a norm before its blocks": {"pre_norm": True, "embed_layer": plain_embed},
    "a patch embedding that is not a plain convolution": {"pre_norm": True},
    "attention pooling": {"class_token": False, "global_pool": "map"},
    "no layer norm after its blocks": {"final_norm": False},
    "attention or norms in blocks.0 that are not a plain ViT's": {"qk_norm": True},
    "an MLP in blocks.0 that is not a plain ViT's": {"mlp_layer": timm.layers.SwiGLUPacked},
}


@pytest.mark.parametrize("what", REFUSED)
def test_models_that_are_refused(what):
    with pytest.raises(NotImplementedError, match=f"a LookupViT has no counterpart for {what}; .*nn.LookupViT"):
        LookupViT.from_vit(make(**REFUSED[what]), grid=GRID)


def test_other_models_that_are_refused():
    with pytest.raises(NotImplementedError, match=r"no counterpart for a timm.models.deit.VisionTransformerDistilled"):
        LookupViT.from_vit(VisionTransformerDistilled(**TINY), grid=GRID)
    with pytest.raises(NotImplementedError, match=r"no counterpart for a tokred_kernels.nn.lookupvit.LookupViT"):
        LookupViT.from_vit(LookupViT.from_vit(make(), grid=GRID), grid=GRID)
    other = make()
    other.blocks[2].mlp.act = nn.GELU(approximate="tanh")
    with pytest.raises(NotImplementedError, match=r"an MLP in blocks\.2"):
        LookupViT.from_vit(other, grid=GRID)
