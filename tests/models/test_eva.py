# SPDX-License-Identifier: MIT
"""timm's Eva (EVA, DINOv3, Perception Encoder): every method on models with rotary positions."""

import copy

import method_settings
import pytest
import torch
from pruning_models import set_counts
from torch import nn
from written_out import block_gradients, load_dense

from tokred_kernels import calibrate_thresholds, diffrate_search, flops, unmerge, use_backend
from tokred_kernels.methods.diffrate import kept_counts
from tokred_kernels.models.imports import import_timm
from tokred_kernels.models.state import TokenState
from tokred_kernels.nn import LinearSegmenter
from tokred_kernels.patching import patch, unpatch

timm = import_timm()
eva = timm.models.eva
dense_rope, dense_tome = load_dense("rope"), load_dense("tome")

# 36 patches; head width 16.
TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
ROPE = {"use_rot_pos_emb": True}
DINOV3 = {"rope_type": "dinov3", "rope_rotate_half": True, "use_abs_pos_emb": False}
MODELS = {
    "eva, no rope": {},
    "eva02": {**ROPE, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "scale_attn_inner": True},
    "dinov3": {**ROPE, **DINOV3, "qkv_bias": False, "num_reg_tokens": 4, "init_values": 0.5, "global_pool": "token"},
    "perception encoder": {**ROPE, "attn_type": "rope", "use_pre_transformer_norm": True, "global_pool": "map"},
    "no prefix": {**ROPE, "class_token": False},
    "fewer heads of keys": {
        **ROPE,
        "attn_type": "rope",
        "qkv_fused": False,
        "num_kv_heads": 1,
        "qk_norm": True,
        "init_values": 0.5,
        "attn_only_layer_scale": True,
    },
    "mrope": {**ROPE, "rope_type": "mrope", "rope_mrope_section": (4, 2, 2)},
}
METHODS = method_settings.METHODS | {"algm, packed": {"layers": (0, 2), "threshold": 0.2, "count": "image"}}
BY_SIZE = ("tome", "algm", "algm, packed")

pytestmark = pytest.mark.usefixtures("one_thread")


def make(name="dinov3", **more):
    model = eva.Eva(**{**TINY, **MODELS[name], **more}).eval()
    for parameter in model.parameters():  # timm's initial biases and tokens are zero or tiny, and would test nothing
        nn.init.normal_(parameter, std=0.2)
    return model


def images(batch=2, size=48):
    return torch.randn(batch, 3, size, size)


def put(model, method):
    return patch(model, method.partition(",")[0], **METHODS[method])


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_means_over_the_places_of_members(name, prop_attn, backend):
    model, x, schedule = make(name).double(), images().double(), [5, 0, 7, 100]
    with torch.no_grad():
        expected, members = dense_rope.forward(model, x, schedule, dense_tome.choose, prop_attn)
        patch(model, "tome", r=schedule, prop_attn=prop_attn)
        with use_backend(backend):
            tokens = model.forward_features(x)
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-6)
    for own, dest in zip(members, model.token_map.dest, strict=True):
        assert all((dest[together] == slot).all() for slot, together in enumerate(own))


@pytest.mark.parametrize("name", MODELS)
def test_r_0_changes_nothing(name):
    model, x = make(name), images()
    expected = model(x)
    assert torch.equal(patch(model, "tome", r=0)(x), expected)
    assert torch.equal(unpatch(model)(x), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["dinov3", "eva02"])
def test_positions_follow_every_method(name, method):
    model, x = put(make(name).double(), method), images().double()
    (first,) = model.embed(x)[1]
    assert (first.shape, (first[: model.num_prefix_tokens, :16] == 0).all()) == ((36 + model.num_prefix_tokens, 32), 1)
    followed = []

    def compare(block, args, output):
        before, (_, after, token_map) = args[1], output
        if token_map is None:
            assert after.rope is before.rope
            return
        sizes = images_of(before.size, before.packing) if method in BY_SIZE else [None, None]
        befores, afters = images_of(before.rope, before.packing), images_of(after.rope, after.packing)
        for image, (rope, left) in enumerate(zip(befores, afters, strict=True)):
            dest = token_map.image(image).dest[0]
            for slot, mean in enumerate(left):
                weight = torch.ones(len(dest)) if sizes[image] is None else sizes[image][:, 0]
                weight = (weight * (dest == slot)).double()
                torch.testing.assert_close(mean, (weight @ rope) / weight.sum())
        followed.append(token_map)

    for block in model.blocks:
        block.register_forward_hook(compare)
    with torch.no_grad():
        model(x)
    if method == "dynamicvit":  # its tokens go before the blocks, and none merge
        block = model.blocks[-1]
        block.register_forward_hook(lambda block, args, output: followed.append(output[1].rope))
        model(x)
        for dest, left in zip(model.token_map.dest, followed[0], strict=True):
            assert torch.equal(left[dest[dest >= 0].long()], first[dest >= 0])
    assert followed


def images_of(rows, packing):
    """Return the rows (N, ...) of each of two images."""
    if packing is not None:
        return rows.split(packing.lengths)
    return [rows, rows] if rows is None else rows.expand(2, -1, -1)


def test_an_image_in_a_packed_batch_gives_what_it_gives_alone():
    model, x = put(make(), "algm, packed"), images(3)
    with torch.no_grad():
        together = model(x)
        assert len(set(model.token_map.packed.lengths)) > 1
        alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_scores_written_out():
    model, x = make().double(), images().double()
    target = torch.randn(2, 48).double()
    expected = block_gradients(
        model, dense_rope.forward(model, x, [5] * 4, dense_tome.choose)[0][:, 0].mul(target).sum()
    )
    ours = block_gradients(model, patch(model, "tome", r=5).forward_features(x)[:, 0].mul(target).sum())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", METHODS)
def test_training_with_everything_that_drops(method, checkpointing):
    rates = {"drop_path_rate": 0.2, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "rope_shift_coords": 0.1}
    if method in ("tome", "evit"):
        rates["patch_drop_rate"] = 0.25
    model = put(make(**rates), method).train()
    model.set_grad_checkpointing(checkpointing)
    model(images(4)).square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_masking_equals_pruning():
    model, x = patch(make("eva02", global_pool="token").double(), "diffrate", kept=None), images().double()
    counts = [37, 30, 21, 12], [37] * 4
    set_counts(model, counts)
    assert kept_counts(model) == counts
    with torch.no_grad():
        pruned = model(x)
        masked = model.train()(x)
    # The published policy adds 1e-6 to every sum.
    torch.testing.assert_close(masked, pruned, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_learned_counts_move_positions_as_tokens(training):
    model = patch(make("eva02").double(), "diffrate", kept=None).train(training)
    counts = [37, 30, 21, 12], [37, 27, 20, 12]
    set_counts(model, counts)
    assert kept_counts(model) == counts
    block, tokens = model.blocks[1], torch.randn(2, 37, 32).double()
    state = TokenState(patches=36, rope=tokens)
    left, after, _ = block.tokred_reducer.reduce(block, tokens, None, torch.rand(2, 37), state)
    assert left.shape[1] == (37 if training else 27)
    torch.testing.assert_close(after.rope, left, rtol=0, atol=0)
    assert not torch.equal(after.rope[:, :27], tokens[:, :27])


@pytest.mark.parametrize("method", ["tome", "evit", "dynamicvit", "diffrate"])
def test_compiles_whole(method):
    model, x = put(make(), method), images()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_exports():
    model, x = put(make(), "tome"), images()
    exported = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (name, method)
        for name in ("dinov3", "eva02", "perception encoder", "fewer heads of keys")
        for method in METHODS
        if (name, method) != ("perception encoder", "dynamicvit")  # which refuses attention pooling
    ],
)
def test_flops_are_those_that_are_counted(name, method):
    # Gradients stay on: torch's counter fails in attention pooling without.
    model, x = put(make(name), method), images(1)
    model(x)
    with flops.counter(display=False) as counted:
        model(x)
    assert flops.count(model).total == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_half_precision_and_autocast():
    model, x = put(make(), "tome"), images()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert nn.functional.cosine_similarity(model(x).float(), expected).min() > 0.9
    y = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(y.float(), expected).min() > 0.9


def test_image_sizes_and_batches_may_change():
    model = put(make(dynamic_img_size=True), "tome")
    for batch, size, tokens in ((2, 48, 41), (1, 64, 69), (3, 16, 9)):
        assert model(images(batch, size)).shape == (batch, 5)
        assert (model.token_map.batch, model.token_map.num_tokens) == (batch, tokens)
    assert put(make(), "tome")(images(0)).shape == (0, 5)


def test_attention_without_the_fused_kernel_agrees():
    model, x = put(make(), "tome"), images()
    expected = model(x)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_forward_leaves_no_positions_behind():
    model = put(make(), "tome")
    model(images())
    assert model.tokred_trace.state.rope is None
    assert unmerge(model.forward_features(images()), model.token_map).shape == (2, 41, 48)


def test_what_takes_models_takes_it():
    thresholds = calibrate_thresholds(make(), [images()], layers=[0], progress=False)
    encoder = patch(make(), "algm", layers=(0, 2), threshold=thresholds)
    assert LinearSegmenter(encoder, 7)(images()).shape == (2, 7, 48, 48)


def test_counts_are_searched():
    model, batches = make("eva02", global_pool="token"), [(images(4), torch.arange(4))]
    found = diffrate_search(model, batches, 0.8 * flops.count(model).gflops, steps=2, progress=False)
    assert all(len(counts) == 4 and max(counts) <= 37 for counts in found[:2])


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        (lambda: make(rope_type="mixed", rope_rotate_half=False), "tome", 'rope_type="mixed".*not supported'),
        (lambda: make("eva, no rope", use_post_norm=True), "tome", "blocks.0 .*EvaBlockPostNorm"),
        (make, "lookupvit", "a LookupViT has no counterpart for a timm.models.eva.Eva"),
        (lambda: nn.Sequential(make()), "tome", "give the Eva inside it"),
        (lambda: make("no prefix"), "diffrate", "class token"),
    ],
    ids=["mixed", "post norm", "lookupvit", "wrapped", "diffrate"],
)
def test_what_is_refused(model, method, message):
    settings = {"grid": (3, 3)} if method == "lookupvit" else METHODS[method]
    with pytest.raises((NotImplementedError, ValueError), match=message):
        patch(model(), method, **settings)
