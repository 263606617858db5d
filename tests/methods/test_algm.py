# SPDX-License-Identifier: MIT
"""ALGM in timm's models: the numbers against a plain rewriting of the paper, and every way to count."""

import copy
import pickle

import pytest
import torch
from algm_models import (
    COUNTS,
    GRID,
    MODELS,
    TINY,
    VisionTransformer,
    dense_algm,
    images,
    make,
    some,
    threshold_for,
    vit,
)
from torch import nn
from written_out import block_gradients

from tokred_kernels import unmerge, use_backend
from tokred_kernels.methods.algm import Similarity, Thresholds, calibrate_thresholds
from tokred_kernels.patching import patch, patched_method, unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the numbers


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("prop_attn", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_paper_written_out(name, prop_attn, backend):
    model, x = make(name).double(), images().double()
    settings = some(model, x, layers=(0, 1, 3))
    with torch.no_grad():
        expected, sizes, sources = dense_algm.forward(model, x, GRID, **settings, proportional=prop_attn)
        patch(model, "algm", **settings, prop_attn=prop_attn)
        with use_backend(backend):
            tokens = model.forward_features(x)
    after = model.tokred_trace.left
    assert after[0] == 36 + model.num_prefix_tokens - 3 * 3
    assert after[0] > after[1] == after[2] > after[3]  # each of the three has merged some
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.token_sizes[..., 0].double(), sizes, rtol=0, atol=0)
    torch.testing.assert_close(model.token_map.source(torch.float64), sources, rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": (1,)},
        {"layers": (0, 2), "window": (3, 2)},
        {"layers": (0, 2), "window": (4, 5)},
        {"layers": (0, 2), "global_threshold": 0.5},
        {"layers": (0, 2), "global_threshold": -2.0},
    ],
    ids=["one layer", "oblong window", "rim", "given global threshold", "as many pairs as can be"],
)
def test_settings_are_those_of_the_paper_written_out(settings):
    model, x = make().double(), images().double()
    window, few = settings.get("window", (2, 2)), settings.get("window") == (4, 5)  # of those there is just one
    threshold = 0.0 if few else threshold_for(model, x, layer=settings["layers"][0], window=window)
    with torch.no_grad():
        expected, sizes, _ = dense_algm.forward(model, x, GRID, **settings, threshold=threshold)
        tokens = patch(model, "algm", **settings, threshold=threshold).forward_features(x)
    assert tokens.shape[1] <= 37 - (19 if few else 3 * (window[0] * window[1] - 1))
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.token_sizes[..., 0].double(), sizes, rtol=0, atol=0)


@pytest.mark.parametrize("count", [[4, 5], 3, [0, 2], [2, 0], [100, 100]], ids=str)
def test_fixed_counts_are_those_of_the_paper_written_out(count):
    model, x = make().double(), images().double()
    counts = count if isinstance(count, list) else [count, count]
    with torch.no_grad():
        expected, sizes, _ = dense_algm.forward(model, x, GRID, (0, 2), threshold=2.0, counts=counts)
        tokens = patch(model, "algm", layers=[0, 2], threshold=2.0, count=count).forward_features(x)
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.token_sizes[..., 0].double(), sizes, rtol=0, atol=0)


def test_gradients_are_those_of_the_paper_written_out():
    model, x = make("registers").double(), images().double()
    target, settings = torch.randn(3, 48).double(), some(model, x)
    expected = block_gradients(model, dense_algm.forward(model, x, GRID, **settings)[0][:, 0].mul(target).sum())
    ours = block_gradients(model, patch(model, "algm", **settings).forward_features(x)[:, 0].mul(target).sum())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_calibrated_thresholds_are_read_for_their_layers():
    model, x = make(), images()
    plain, local = model(x), threshold_for(model, x)
    found = Thresholds({0: Similarity(local, 0.0, 9), 2: Similarity(0.7, 0.25, 9)})

    def run(threshold, global_threshold=None):
        y = patch(model, "algm", layers=(0, 2), threshold=threshold, global_threshold=global_threshold)(x)
        unpatch(model)
        return y

    assert torch.equal(run(found, found), run(local, 0.95))
    assert torch.equal(run(found), run(local))
    assert not torch.equal(run(found), run(found, found))
    assert not torch.equal(run(found), plain)
    with pytest.raises(ValueError, match="layer must be one of 0, 2, got 1"):
        patch(model, "algm", layers=(1, 2), threshold=found)


def test_calibration_and_patch_go_together():
    model, x = make(), images()
    found = calibrate_thresholds(model, [x], layers=[0], window=(2, 2), progress=False)
    patch(model, "algm", layers=(0, 2), threshold=found, count="image")(x)
    assert patched_method(model).threshold == found.threshold(0)


def test_sizes_change_the_attention_where_asked():
    model, x = make(), images()
    settings = some(model, x)
    without = patch(model, "algm", **settings)(x)
    with_bias = patch(unpatch(model), "algm", **settings, prop_attn=True)(x)
    assert (with_bias - without).abs().max() > 1e-3


# --- nothing to merge, or everything


@pytest.mark.parametrize("count", ["batch", [0, 0]])
def test_where_nothing_merges_nothing_changes(count):
    model, x = make(), images()
    expected = model(x)
    patch(model, "algm", layers=(0, 2), threshold=2.0, global_threshold=2.0, count=count)
    assert torch.equal(model(x), expected)
    assert torch.equal(model.token_map.dest, torch.arange(37, dtype=torch.int32).expand(3, -1))
    assert torch.equal(model.token_sizes, torch.ones(3, 37, 1))


def test_where_nothing_merges_packed_tokens_are_all_tokens():
    model, x = make(), images()
    expected = model(x)
    patch(model, "algm", layers=(0, 2), threshold=2.0, global_threshold=2.0, count="image")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert model.token_map.packed.lengths == (37, 37, 37)
    assert torch.equal(model.token_map.dest.flatten(), torch.arange(3 * 37, dtype=torch.int32))


def test_one_image_that_cannot_merge_keeps_the_batch_whole():
    model, x = make(), images()
    threshold = threshold_for(model, x[:1], merged=1) + 0.05  # above any of the first image
    patch(model, "algm", layers=(0,), threshold=threshold, count="image")
    model(x)
    lengths = model.token_map.packed.lengths
    assert lengths[0] == 37 > lengths[2]
    patch(unpatch(model), "algm", layers=(0,), threshold=threshold)
    model(x)
    assert model.token_map.num_out == 37


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_images_of_one_colour(value, count):
    model = make(no_embed_class=True)
    nn.init.zeros_(model.pos_embed)  # all patches are equal, to the bit
    patch(model, "algm", layers=(0, 2), count=count)
    assert model(torch.full((2, 3, 48, 48), value)).isfinite().all()
    if count != COUNTS["fixed"]:
        assert model.tokred_trace.left[0] in (10, (10, 10))  # the class token and 9 windows


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_an_empty_batch(count, pool):
    model = patch(make(global_pool=pool), "algm", layers=(0, 2), threshold=0.5, count=count)
    assert model(images(0)).shape == (0, 5)
    assert model.token_map.batch == 0
    assert model.token_sizes.numel() == 0


# --- what a model is used for


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("name", MODELS)
def test_no_token_is_lost(name, count):
    model, x = make(name), images()
    tokens = patch(model, "algm", **some(model, x), count=count).forward_features(x)
    prefix, token_map = model.num_prefix_tokens, model.token_map
    for image in range(3):
        own = token_map.image(image)
        assert own.num_out < own.num_tokens == 36 + prefix
        assert torch.equal(own.dest[0, :prefix], torch.arange(prefix, dtype=torch.int32))
        assert (own.dest[0, prefix:] >= prefix).all()
        assert own.dest[0].unique().numel() == own.num_out
    assert model.token_sizes.sum() == 3 * (36 + prefix)
    assert torch.equal(model.token_sizes[..., 0].int(), token_map.count)
    dense = unmerge(tokens, token_map)
    assert dense.shape == (3, 36 + prefix, 48)
    rows = tokens.view(-1, 48)
    offset = 0 if token_map.packed is not None else token_map.num_out
    for image in range(3):
        assert torch.equal(dense[image], rows[(token_map.dest[image] + image * offset).long()])


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_unpatch_restores_everything(count):
    model, x = make("q and k norm, layer scale"), images()
    expected, before = model(x), [(type(m), set(m.__dict__)) for m in model.modules()]
    keys = list(model.state_dict())
    patch(model, "algm", **some(model, x), count=count)
    assert not torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    assert unpatch(model) is model
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_the_grid_is_that_of_the_images(count):
    model = patch(make(dynamic_img_size=True), "algm", layers=(0, 2), threshold=-1.0, window=(2, 3), count=count)
    for size in ((48, 48), (16, 96), (64, 32), (40, 56)):
        assert model(images(2, size)).shape == (2, 5)
        down, across = size[0] // 8, size[1] // 8
        windows = (down // 2) * (across // 3)
        merged = min(windows, 3) if count == COUNTS["fixed"] else windows
        left = 1 + down * across - 5 * merged
        assert model.tokred_trace.left[0] in (left, (left, left))
    # Windows have neighbors only: every merged token has patches of adjacent rows and columns.
    patch(unpatch(model), "algm", layers=(0,), threshold=-1.0, window=(2, 3))
    model(images(1, (16, 96)))
    window = model.token_map.dest[0, 1:].view(2, 12)
    assert all(window[:, 3 * i : 3 * i + 3].unique().numel() == 1 for i in range(4))


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_an_image_smaller_than_one_window_passes_its_windows_unmerged(count):
    model = make(dynamic_img_size=True)
    settings = {"layers": (1, 3), "window": (2, 3), "count": count, "global_threshold": -1.0}
    patch(model, "algm", threshold=-1.0, **settings)
    for size in ((8, 48), (48, 16), (8, 8)):
        assert model(images(2, size)).shape == (2, 5)
        left = model.tokred_trace.left
        tokens = 1 + size[0] * size[1] // 64
        assert left[1] == tokens
        assert left[3] in (tokens, (tokens, tokens)) if tokens == 2 else left[3] != tokens
    patch(unpatch(model), "algm", threshold=-1.0, **settings, uneven="refuse")
    with pytest.raises(ValueError, match=r"window must fit into the grid \(1, 6\), got \(2, 3\)"):
        model(images(1, (8, 48)))


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_lowers_the_loss(checkpointing, count):
    rates = {"drop_path_rate": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    model = VisionTransformer(**TINY, **rates).train()
    model.set_grad_checkpointing(checkpointing)
    patch(model, "algm", layers=(0, 2), threshold=0.5, count=count)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    x, labels, losses = images(8), torch.arange(8) % 5, []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_checkpointing_gives_the_same_gradients(count):
    model, x = make(), images()
    patch(model, "algm", **some(model, x), count=count).train()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(x).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_distilled_training_on_packed_tokens():
    model, x = make("distilled"), images()
    settings = some(model, x)
    model.set_distilled_training(True)
    patch(model, "algm", **settings).train()
    alone = [model(one[None]) for one in x]
    both = patch(unpatch(model), "algm", **settings, count="image")(x)
    for got, expected in zip(both, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(got, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_patch_dropout_leaves_no_windows():
    model = patch(VisionTransformer(**TINY, patch_drop_rate=0.25), "algm", layers=(0, 2))
    assert model.eval()(images()).shape == (3, 5)
    with pytest.raises(
        NotImplementedError, match=r"patch dropout leaves 27 patches that form none; set model.patch_drop"
    ):
        model.train()(images())
    model.patch_drop = nn.Identity()
    assert model(images()).shape == (3, 5)


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_half_precision_and_autocast(count):
    model, x = make(), images()
    expected = patch(model, "algm", **some(model, x), count=count)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert model.token_sizes.dtype == torch.float32
    assert nn.functional.cosine_similarity(y.float(), expected).min() > 0.9
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert model.token_sizes.dtype == torch.float32


def test_copies_and_pickles_are_patched_models_of_their_own():
    model, x = make(), images()
    expected = patch(model, "algm", **some(model, x), count="image")(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(AttributeError, match="before its first forward"):
            _ = other.token_map
        assert torch.equal(other(x), expected)
        unpatch(other)
    assert torch.equal(model(x), expected)


def test_hooks_see_the_state():
    model, x, seen = make(), images(), []
    threshold = threshold_for(model, x, layer=1)
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    patch(model, "algm", layers=(1, 3), threshold=threshold, count="image", trace=False)(x)
    states = [state for _, state, _ in seen]
    assert [state.grid for state in states] == [GRID, None, None, None]
    assert [state.packing is None for state in states] == [True, False, False, False]
    assert [token_map is None for _, _, token_map in seen] == [True, False, True, False]
    assert seen[3][0].shape == (seen[3][2].num_out, 48)
    assert states[3].size.shape == (seen[3][2].num_out, 1)
    with pytest.raises(AttributeError, match="trace=True"):
        _ = model.token_map


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"threshold": float("nan")}, ValueError, r"ALGM\(threshold=\): threshold must be a number, got NaN"),
        ({"threshold": "0.9"}, TypeError, "threshold must be a number, got str"),
        ({"global_threshold": float("nan")}, ValueError, r"ALGM\(global_threshold=\): .* got NaN"),
        ({"global_threshold": ["0.5"]}, TypeError, r"ALGM\(global_threshold=\): .* got str"),
        ({"global_threshold": [0.5, 0.5]}, ValueError, "a number for each of the 1 layers after the first, got 2"),
        ({"layers": ()}, ValueError, "layers must name at least one block, got none"),
        ({"layers": 1}, TypeError, "layers must be a tuple of ints, got 1"),
        ({"layers": "1"}, TypeError, "layers must be a tuple of ints, got '1'"),
        ({"layers": (1, 1)}, ValueError, r"layers must ascend, got \(1, 1\)"),
        ({"layers": (3, 1)}, ValueError, r"layers must ascend, got \(3, 1\)"),
        ({"layers": (-1, 1)}, ValueError, "layers must be at least 0, got -1"),
        ({"layers": (1, 4)}, ValueError, "layers must be from 0 to 3, the model's last block, got 4"),
        ({"layers": (5, 3)}, ValueError, r"layers must ascend, got \(5, 3\)"),
        ({"layers": (1, 2.0)}, TypeError, r"layers must be an int, got float \(2.0\)"),
        ({"layers": (True, 2)}, TypeError, "layers must be an int, got bool"),
        ({"window": (7, 2)}, ValueError, r"window must fit into the grid \(6, 6\), got \(7, 2\)"),
        ({"window": (1, 1)}, ValueError, "window must hold at least 2 tokens"),
        ({"window": 2}, TypeError, r"window must be a pair \(height, width\), got 2"),
        ({"window": (2, 2.0)}, TypeError, "window width must be an int"),
        ({"window": (4, 2), "uneven": "refuse"}, ValueError, "window must divide the grid"),
        ({"uneven": "pad"}, ValueError, "uneven must be one of keep, refuse, got 'pad'"),
        ({"count": "all"}, ValueError, 'count must be "batch", "image" or an int, got \'all\''),
        ({"count": 2.0}, TypeError, "count must be an int, got float"),
        ({"count": None}, TypeError, "count must be an int, got NoneType"),
        ({"count": True}, TypeError, "count must be an int, got bool"),
        ({"count": -1}, ValueError, "count must be at least 0, got -1"),
        ({"count": [1]}, ValueError, "count must have an int for each of 2 layers, got 1"),
        ({"count": [1, "batch"]}, TypeError, r"count\[1\] must be an int, got str"),
        ({"count": "image", "group": "a group"}, ValueError, 'group must be None unless count="batch"'),
        ({"count": [1, 2], "group": "a group"}, ValueError, 'group must be None unless count="batch"'),
        ({"prop_attn": 1}, TypeError, "prop_attn must be True or False, got 1"),
        ({"trace": "yes"}, TypeError, "trace must be True or False, got 'yes'"),
        ({"r": 8}, TypeError, 'a setting of "algm" must be one of layers, window, .*, got r'),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_settings(settings, error, message):
    model = make()
    with pytest.raises(error, match=message):
        patch(model, "algm", **{"layers": (0, 2), **settings})
    assert type(model) is VisionTransformer  # left as it was
    assert type(model.blocks[0]) is vit.Block


def test_a_model_without_a_grid_is_refused():
    model = make()
    model.patch_embed = nn.Linear(3, 3)
    with pytest.raises(NotImplementedError, match="Linear, the model's patch_embed, does not define one"):
        patch(model, "algm", layers=(0, 2))
    patch(model, "tome", r=4)  # which needs none


def test_patched_once_is_enough():
    model = patch(make(), "algm", layers=(0, 2))
    for method, settings in (("algm", {}), ("tome", {"r": 4})):
        with pytest.raises(ValueError, match=r'already patched \("algm", layers=\(0, 2\), window=\(2, 2\), thresh'):
            patch(model, method, **settings)
