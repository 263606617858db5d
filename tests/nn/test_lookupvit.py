# SPDX-License-Identifier: MIT
"""The LookupViT model: its grids, its heads, and that it trains."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from tokred_kernels.models.imports import import_timm
from tokred_kernels.nn.lookupvit import (
    LookupLogits,
    LookupViT,
    lookup_loss,
    lookupvit_base,
    lookupvit_large,
    lookupvit_small,
    lookupvit_tiny,
)
from tokred_kernels.nn.lookupvit_flops import lookupvit_flops
from tokred_kernels.nn.lookupvit_resize import resize_tokens

timm = import_timm()

TINY = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2, "grid": (2, 2)}
VIDEO = {**TINY, "img_size": (4, 32, 24), "patch_size": (2, 8, 8), "grid": (1, 2, 3)}

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


def make(**settings):
    return LookupViT(**{**TINY, **settings})


def images(batch=3, size=(32, 32)):
    return torch.randn(batch, 3, *size)


def tokens_seen(model, *args):
    """How many compressed and lookup tokens enter the blocks."""
    seen = set()
    hooks = [
        block.register_forward_pre_hook(lambda _, z: seen.add((z[0].shape[1], z[1].shape[1]))) for block in model.blocks
    ]
    model(*args)
    for hook in hooks:
        hook.remove()
    return seen


# --- grids


@pytest.mark.parametrize("grid", [None, (1, 1), (3, 2), [4, 4], (1, 4)])
def test_any_grid_at_run_time(grid):
    model = make().eval()
    compressed = 4 if grid is None else grid[0] * grid[1]
    assert tokens_seen(model, images(), grid) == {(compressed, 16)}
    z_p, z_l = model.forward_features(images(), grid)
    assert (z_p.shape, z_l.shape) == ((3, compressed, 32), (3, 16, 32))
    assert model(images(), grid).shape == (3, 5)


def test_what_enters_the_blocks():
    model, x = make().eval(), images()
    entered = []
    model.blocks[0].register_forward_pre_hook(lambda _, z: entered.extend(z))
    model(x, (2, 3))
    lookup = F.conv2d(x, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8)
    lookup = lookup.flatten(2).transpose(1, 2) + model.pos_embed
    torch.testing.assert_close(entered[1], lookup)
    grid = lookup.transpose(1, 2).unflatten(2, (4, 4))
    expected = F.interpolate(grid, size=(2, 3), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(entered[0], expected)


def test_training_draws_one_of_the_grids_for_each_step():
    model = make(grids=[(1, 1), (2, 3), (4, 4)])
    drawn = Counter(model.sample_grid() for _ in range(600))
    assert set(drawn) == {(1, 1), (2, 3), (4, 4)}
    assert min(drawn.values()) > 150
    seen = set.union(*(tokens_seen(model, images(1)) for _ in range(30)))
    assert seen == {(1, 16), (6, 16), (16, 16)}
    assert tokens_seen(model, images(1), (2, 2)) == {(4, 16)}
    assert set.union(*(tokens_seen(model.eval(), images(1)) for _ in range(10))) == {(4, 16)}
    assert make().sample_grid() == (2, 2)


def test_processes_that_share_a_seed_draw_the_same_grids():
    model = make(grids=[(1, 1), (2, 3), (4, 4)])
    runs = []
    for noise in range(2):
        torch.manual_seed(noise)  # other draws of each process
        generator = torch.Generator().manual_seed(7)
        runs.append([model.sample_grid(generator) for _ in range(20)])
    assert runs[0] == runs[1]
    torch.manual_seed(3)
    first = [model.sample_grid() for _ in range(20)]
    torch.manual_seed(3)
    assert first == [model.sample_grid() for _ in range(20)] != runs[0]


@pytest.mark.parametrize("grid", [None, (2, 4, 3), (1, 1, 1)])
def test_video(grid):
    model = LookupViT(**VIDEO).eval()
    compressed = 6 if grid is None else grid[0] * grid[1] * grid[2]
    assert tokens_seen(model, torch.randn(2, 3, 4, 32, 24), grid) == {(compressed, 2 * 4 * 3)}
    assert model(torch.randn(2, 3, 4, 32, 24), grid).shape == (2, 5)
    assert model.patch_embed.proj.weight.shape == (32, 3, 2, 8, 8)


@pytest.mark.parametrize("size", [(32, 32), (64, 40), (16, 16)])
def test_other_sizes_resize_the_positions(size):
    model = make(dynamic_img_size=True).eval()
    grid = (size[0] // 8, size[1] // 8)
    assert tokens_seen(model, images(1, size)) == {(4, grid[0] * grid[1])}
    entered = []
    model.blocks[0].register_forward_pre_hook(lambda _, z: entered.append(z[1]))
    model(torch.zeros(1, 3, *size))
    positions = resize_tokens(model.pos_embed, (4, 4), grid) + model.patch_embed.proj.bias
    torch.testing.assert_close(entered[0], positions)


# --- heads


def test_two_heads_when_training_and_their_average_when_evaluating():
    model, x = make(), images()
    logits = model(x)
    assert isinstance(logits, LookupLogits)
    z_p, z_l = model.forward_features(x)
    torch.testing.assert_close(logits.compressed, model.head(z_p.mean(1)))
    torch.testing.assert_close(logits.lookup, model.head_lookup(z_l.mean(1)))
    assert not torch.allclose(logits.compressed, logits.lookup)
    torch.testing.assert_close(model.eval()(x), (logits.compressed + logits.lookup) / 2)


def test_tokens_are_normalised_before_the_mean():
    model = make()
    model.pos_embed.data *= 100
    for tokens in model.forward_features(images()):
        torch.testing.assert_close(tokens.mean(-1), torch.zeros(tokens.shape[:2]), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens.square().mean(-1), torch.ones(tokens.shape[:2]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("labels", [torch.tensor([1, 0, 4]), torch.rand(3, 5).softmax(-1)], ids=["classes", "mixed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_sum_of_both(labels, smoothing):
    logits = LookupLogits(torch.randn(3, 5), torch.randn(3, 5))
    target = F.one_hot(labels, 5).float() if labels.dim() == 1 else labels
    target = target * (1 - smoothing) + smoothing / 5
    expected = -sum((target * own.log_softmax(-1)).sum(-1).mean() for own in logits)
    torch.testing.assert_close(lookup_loss(logits, labels, label_smoothing=smoothing), expected)


def test_the_loss_says_that_a_model_is_evaluating():
    with pytest.raises(TypeError, match=r"logits must be a LookupLogits, got Tensor.*call model.train\(\)"):
        lookup_loss(make().eval()(images()), torch.tensor([0, 1, 2]))


def test_no_classes_give_the_means_of_the_tokens():
    model = make(num_classes=0)
    pooled = model(images())
    assert [tuple(own.shape) for own in pooled] == [(3, 32)] * 2
    assert lookupvit_flops(model).head == 0


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lookupvit_tiny, "vit_tiny_patch16_224"),
        (lookupvit_small, "vit_small_patch16_224"),
        (lookupvit_base, "vit_base_patch16_224"),
        (lookupvit_large, "vit_large_patch16_224"),
    ],
)
def test_named_sizes_are_those_of_the_vits(build, name):
    with torch.device("meta"):
        model, vit = build(num_classes=7, grid=(3, 5), drop_path_rate=0.1), timm.create_model(name, num_classes=7)
    assert (model.grid, model.num_classes, model.lookup_grid) == ((3, 5), 7, (14, 14))
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, value in vit.state_dict().items():
        if key == "pos_embed":
            assert ours[key] == tuple(value[:, 1:].shape)
        elif key != "cls_token":
            assert ours[key] == tuple(value.shape)
    assert [model.blocks[i].drop_path.rate for i in (0, -1)] == [0.0, pytest.approx(0.1)]
    assert model.blocks[0].attn.num_heads == vit.blocks[0].attn.num_heads


# --- use


def test_state_dicts_come_back():
    model, again = make(init_values=0.1, scatter_proj=True).eval(), make(init_values=0.1, scatter_proj=True).eval()
    x = images()
    assert not torch.equal(model(x), again(x))
    again.load_state_dict(model.state_dict())
    assert torch.equal(model(x), again(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_compiles_whole_for_a_grid():
    model, x, labels, grid = make(depth=1), images(), torch.tensor([0, 1, 2]), (3, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(lookup_loss(model(x, grid), labels), model.parameters())
    found = torch.autograd.grad(lookup_loss(compiled(x, grid), labels), model.parameters())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_empty_batch():
    model = make().eval()
    assert model(images(0)).shape == (0, 5)


def test_autocast_and_bfloat16():
    model, x = make().eval(), images()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        assert all(z.dtype == torch.float32 for z in model.forward_features(x))
    half = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    for logits in (found, half):
        assert (logits.float() - expected).norm() < 0.05 * expected.norm()


def test_every_parameter_trains():
    for settings in (TINY, VIDEO):
        model = LookupViT(**settings, init_values=0.1, scatter_proj=True)
        x = torch.randn(2, 3, *model.img_size)
        lookup_loss(model(x), torch.tensor([0, 1])).backward()
        # The last block's self attention and MLP reach both heads, and so does all that is before them.
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.dim() > 1)


def test_learns_random_labels_of_random_images():
    model = make(embed_dim=48, num_heads=3, grids=[(2, 2), (3, 3)])
    x, labels = images(16), torch.randint(0, 5, (16,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(60):
        loss = lookup_loss(model(x), labels)
        if step == 0:
            assert 2 < loss.item() < 6  # about twice log 5
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for grid in ((2, 2), (3, 3)):
        assert lookup_loss(model(x, grid), labels).item() < 0.1
    assert (model.eval()(x).argmax(-1) == labels).all()


# --- what is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"grid": (5, 2)},
            ValueError,
            r"grid must be at most the lookup grid \(4, 4\) in each dim.*, got \(5, 2\)",
        ),
        ({"grid": (2, 5)}, ValueError, r"grid must be at most the lookup grid \(4, 4\)"),
        (
            {"grid": (2, 2, 2)},
            ValueError,
            r"grid must have 2 numbers, as the lookup grid .* has, got \(2, 2, 2\)",
        ),
        ({"grid": 2}, ValueError, "grid must have 2 numbers"),
        ({"grid": (0, 2)}, ValueError, "grid must be at least 1, got 0"),
        ({"grid": (-1, 2)}, ValueError, "grid must be at least 1, got -1"),
        ({"grid": (2.0, 2)}, TypeError, "grid must be an int, got float"),
        ({"grids": []}, ValueError, "grids must be a list of at least one grid, or None"),
        ({"grids": [(2, 2), (5, 5)]}, ValueError, "each of grids must be at most the lookup grid"),
        ({"grids": (2, 2)}, ValueError, "each of grids must have 2 numbers"),
        ({"num_heads": 3}, ValueError, "num_heads must divide embed_dim = 32, got 3"),
        (
            {"img_size": 30},
            ValueError,
            r"img_size must be a multiple of the patch size \(8, 8\), got \(30, 30\)",
        ),
        ({"img_size": (32, 28)}, ValueError, "img_size must be a multiple of the patch size"),
        ({"img_size": (2, 2, 32, 32)}, ValueError, "img_size must have 2 or 3 dimensions"),
        ({"patch_size": (8, 8, 8), "img_size": (32, 32)}, ValueError, "patch_size must have 2 numbers"),
        ({"img_size": (4, 32, 32), "patch_size": (2, 8, 8)}, ValueError, "grid must have 3 numbers"),
        ({"depth": 0}, ValueError, "depth must be at least 1, got 0"),
        ({"drop_path_rate": 1}, ValueError, "drop_path_rate must be from 0 to below 1, got 1"),
        ({"num_classes": -1}, ValueError, "num_classes must be at least 0, got -1"),
    ],
    ids=str,
)
def test_settings_that_are_refused(change, error, message):
    with pytest.raises(error, match=f"tokred_kernels.nn.LookupViT: {message}"):
        make(**change)


@pytest.mark.parametrize(
    ("dynamic", "x", "grid", "error", "message"),
    [
        (
            False,
            torch.zeros(1, 3, 40, 32),
            None,
            ValueError,
            r"images of \(32, 32\) pixels, got \(40, 32\).*dynamic",
        ),
        (True, torch.zeros(1, 3, 36, 32), None, ValueError, r"multiple of the patch size \(8, 8\), got \(36, 32\)"),
        (True, torch.zeros(1, 3, 8, 32), None, ValueError, r"grid must be at most the lookup grid \(1, 4\)"),
        (
            False,
            torch.zeros(1, 1, 32, 32),
            None,
            ValueError,
            r"x must be \(B, 3, height, width\), got shape \(1, 1",
        ),
        (False, torch.zeros(3, 32, 32), None, ValueError, r"x must be \(B, 3, height, width\)"),
        (False, torch.zeros(1, 3, 32, 32).int(), None, TypeError, "x must be float32"),
        (False, torch.zeros(1, 3, 32, 32), (5, 5), ValueError, r"grid must be at most the lookup grid \(4, 4\)"),
        (False, torch.zeros(1, 3, 32, 32), (2,), ValueError, "grid must have 2 numbers"),
        (False, torch.zeros(1, 3, 32, 32), (2, 0), ValueError, "grid must be at least 1, got 0"),
    ],
)
def test_inputs_that_are_refused(dynamic, x, grid, error, message):
    with pytest.raises(error, match=f"tokred_kernels.nn.LookupViT: .*{message}"):
        make(dynamic_img_size=dynamic)(x, grid)
