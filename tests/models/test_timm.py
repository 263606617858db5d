# SPDX-License-Identifier: MIT
"""ToMe in timm's models: the numbers against a plain rewriting of the paper, and everything a model is used for."""

import copy
import pickle

import pytest
import torch
from torch import nn
from written_out import block_gradients, load_dense

from tokred_kernels import unmerge, use_backend
from tokred_kernels.methods import ToMe
from tokred_kernels.models.imports import import_timm
from tokred_kernels.patching import patch, unpatch

timm = import_timm()
vit = timm.models.vision_transformer
VisionTransformer = vit.VisionTransformer
VisionTransformerDistilled = timm.models.deit.VisionTransformerDistilled

dense_tome = load_dense("tome")

# 36 patches: even with no prefix, odd with a class token; head width 16.
TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
MODELS = {
    "vit": (VisionTransformer, {}),
    "distilled": (VisionTransformerDistilled, {}),
    "registers": (VisionTransformer, {"reg_tokens": 4}),
    "registers, no class token": (VisionTransformer, {"reg_tokens": 1, "class_token": False, "global_pool": "avg"}),
    "no prefix": (VisionTransformer, {"class_token": False, "global_pool": "avg"}),
    "q and k norm, layer scale": (VisionTransformer, {"qk_norm": True, "init_values": 0.5, "scale_attn_norm": True}),
    "swiglu, pre norm": (VisionTransformer, {"mlp_layer": timm.layers.SwiGLUPacked, "pre_norm": True}),
    "position without prefix": (VisionTransformer, {"no_embed_class": True, "reg_tokens": 2}),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def make(name="vit", **more):
    kind, settings = MODELS[name]
    model = kind(**{**TINY, **settings, **more}).eval()
    for parameter in model.parameters():  # timm's initial biases and tokens are zero or tiny, and would test nothing
        nn.init.normal_(parameter, std=0.2)
    return model


def images(batch=2, size=48):
    return torch.randn(batch, 3, size, size)


# --- the numbers


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_paper_written_out(name, prop_attn, backend):
    model, x, schedule = make(name).double(), images().double(), [5, 0, 7, 100]
    with torch.no_grad():
        expected, sizes, sources = dense_tome.forward(model, x, schedule, prop_attn)
        patch(model, "tome", r=schedule, prop_attn=prop_attn)
        with use_backend(backend):
            tokens = model.forward_features(x)
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.token_sizes[..., 0].double(), sizes, rtol=0, atol=0)
    torch.testing.assert_close(model.token_map.source(torch.float64), sources, rtol=0, atol=0)


def test_sizes_change_the_attention():
    model, x = make(), images()
    with_bias = patch(model, "tome", r=4)(x)
    without = patch(unpatch(model), "tome", r=4, prop_attn=False)(x)
    assert (with_bias - without).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_r_0_changes_nothing(name):
    model, x = make(name), images()
    expected = model(x)
    assert torch.equal(patch(model, "tome", r=0)(x), expected)
    assert model.token_map.num_out == model.token_map.num_tokens == 36 + model.num_prefix_tokens
    assert torch.equal(model.token_map.dest[0], torch.arange(36 + model.num_prefix_tokens, dtype=torch.int32))
    assert torch.equal(model.token_sizes, torch.ones(2, 36 + model.num_prefix_tokens, 1))


@pytest.mark.parametrize("name", MODELS)
def test_prefix_tokens_stay_first_and_alone(name):
    model = patch(make(name), "tome", r=100)
    model(images())
    prefix = model.num_prefix_tokens
    assert torch.equal(model.token_map.dest[:, :prefix], torch.arange(prefix, dtype=torch.int32).expand(2, -1))
    assert (model.token_map.dest[:, prefix:] >= prefix).all()
    assert (model.token_sizes[:, :prefix] == 1).all()
    assert (model.token_sizes.sum(1) == 36 + prefix).all()
    assert torch.equal(model.token_sizes[..., 0].int(), model.token_map.count)


@pytest.mark.parametrize("pool", ["avg", "avgmax", "max", "map", ""])
@pytest.mark.parametrize("include_prefix", [False, True])
def test_pools_weigh_tokens_by_size(pool, include_prefix):
    model = make("registers", global_pool=pool, pool_include_prefix=include_prefix)
    patch(model, "tome", r=5)
    x = model.forward_features(images())
    sizes = model.token_sizes[:, :, 0].int()
    # Each token as often as it counts: then timm's own pool is right. Random images, so one at a time.
    for image in range(2):
        tokens = x[image].repeat_interleave(sizes[image], dim=0)[None]
        expected = unpatch(copy.deepcopy(model)).pool(tokens) if pool else x[image][None]
        torch.testing.assert_close(model.pool(x)[image][None], expected, rtol=1e-4, atol=1e-5)


def test_pool_of_other_tokens_counts_them_once():
    model = make("no prefix")
    tokens = torch.randn(2, 36, 48)
    expected = model.pool(tokens)
    patch(model, "tome", r=5)(images())
    assert torch.equal(model.pool(tokens), expected)


# --- schedules


@pytest.mark.parametrize(
    ("r", "blocks", "expected"),
    [
        (8, 3, [8, 8, 8]),
        ([4, 0, 2], 3, [4, 0, 2]),
        ((8, 0), 3, [8, 8, 8]),
        ((8, -1), 4, [16, 10, 5, 0]),  # 16, 10.67, 5.33, 0, each cut
        ((8, 1.0), 4, [0, 5, 10, 16]),
        ((13, 0.5), 12, [6, 7, 8, 9, 11, 12, 13, 14, 16, 17, 18, 20]),  # 6 + 14 i / 11: the first is cut from 6.5
        ((8, -1), 1, [16]),
    ],
)
def test_schedule(r, blocks, expected):
    assert ToMe(r).removed_per_block(blocks) == expected


@pytest.mark.parametrize(
    ("r", "error", "message"),
    [
        (-1, ValueError, "must not be negative, got r = -1"),
        (True, TypeError, "an int, a list"),
        (2.0, TypeError, r"got r of type float \(2.0\)"),
        ("8", TypeError, "of type str"),
        (None, TypeError, "of type NoneType"),
        ([1, -2, 0, 0], ValueError, r"r\[1\] = -2"),
        ([1, 2.5, 0, 0], TypeError, r"r\[1\] of type float"),
        ([1] * 5, ValueError, "one entry for each of the model's 4 blocks, got 5"),
        ([1] * 3, ValueError, "one entry for each of the model's 4 blocks, got 3; give 0 for a block"),
        ([], ValueError, "one entry for each of the model's 4 blocks, got 0"),
        ((8, -1.5), ValueError, "inflect must be from -1 to 1, got -1.5"),
        ((8, float("nan")), ValueError, "inflect must be from -1 to 1"),
        ((8, True), TypeError, "inflect must be a number from -1 to 1, got True"),
        ((8, "up"), TypeError, "inflect must be a number from -1 to 1, got 'up'"),
        ((1, 2, 3), ValueError, "a tuple of 3"),
        ((-8, 1), ValueError, r"r\[0\] = -8"),
    ],
)
def test_bad_schedules(r, error, message):
    model = make()
    with pytest.raises(error, match=message):
        patch(model, "tome", r=r)
    assert type(model) is VisionTransformer  # left as it was


# --- putting in and taking out


def test_unpatch_restores_everything():
    model, x = make("q and k norm, layer scale"), images()
    expected, before = model(x), [(type(m), set(m.__dict__)) for m in model.modules()]
    assert patch(model, "tome", r=4) is model
    assert not torch.equal(model(x), expected)
    assert unpatch(model) is model
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before
    assert torch.equal(model(x), expected)


def test_state_dict_is_the_same():
    model = make()
    keys, values = list(model.state_dict()), [v.clone() for v in model.state_dict().values()]
    patch(model, "tome", r=4)(images())
    assert list(model.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), values, strict=True))
    make().load_state_dict(model.state_dict())


class Subclass(VisionTransformer):
    def forward_features(self, x):
        return x


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda: "vit", TypeError, "must be a torch.nn.Module, got str"),
        (
            lambda: nn.Linear(2, 2),
            NotImplementedError,
            "Linear is not supported; supported are timm's VisionTransformer",
        ),
        (lambda: nn.Sequential(make()), NotImplementedError, "give the VisionTransformer inside it"),
        (lambda: torch.compile(make()), NotImplementedError, "OptimizedModule is not supported.*inside it"),
        (lambda: Subclass(**TINY), NotImplementedError, "Subclass is not supported"),
        (lambda: make(block_fn=vit.ParallelScalingBlock), NotImplementedError, r"blocks.0 .*ParallelScalingBlock"),
        (lambda: make(block_fn=vit.ResPostBlock), NotImplementedError, r"blocks.0 .*ResPostBlock.*bipartite_match"),
        (lambda: make(attn_layer="diff"), NotImplementedError, r"blocks.0.attn .*DiffAttention"),
        (lambda: make(global_pool="prr"), NotImplementedError, "AttentionPoolPrr.*another global_pool"),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(1, 1)),
            NotImplementedError,
            "SwinTransformer is not supported",
        ),
    ],
    ids=["str", "linear", "wrapped", "compiled", "subclass", "parallel", "respost", "diff", "prr", "swin"],
)
def test_unsupported_models(model, error, message):
    with pytest.raises(error, match=message):
        patch(model(), "tome", r=1)


def test_what_a_patched_model_refuses():
    model = patch(make(), "tome", r=4)
    with pytest.raises(AttributeError, match="before its first forward"):
        _ = model.token_map
    with pytest.raises(AttributeError, match="before its first forward"):
        _ = model.token_sizes
    with pytest.raises(NotImplementedError, match="does not support attn_mask"):
        model(images(), attn_mask=torch.zeros(37, 37))
    with pytest.raises(NotImplementedError, match="is_causal"):
        model(images(), is_causal=True)
    for call in (model.forward_intermediates, model.get_intermediate_layers):
        with pytest.raises(NotImplementedError, match="unmerge"):
            call(images())
    untraced = patch(make(), "tome", r=4, trace=False)
    untraced(images())
    assert untraced.token_sizes.shape == (2, 21, 1)
    with pytest.raises(AttributeError, match="trace=True"):
        _ = untraced.token_map


@pytest.mark.parametrize("version", ["0.9.16", "1.0.3", "1.0.16.dev0"])
def test_a_timm_that_is_too_old_is_told(version, monkeypatch):
    monkeypatch.setattr(timm, "__version__", version)
    with pytest.raises(ImportError, match=f"timm 1.0.17 or later, got {version}"):
        import_timm()


@pytest.mark.parametrize("version", ["1.0.17", "1.1.0", "2.0"])
def test_a_later_timm_is_taken(version, monkeypatch):
    monkeypatch.setattr(timm, "__version__", version)
    assert import_timm() is timm


def test_importing_timm_twice_is_harmless():
    assert import_timm() is import_timm() is timm
    assert timm.data.create_transform((3, 32, 32)) is not None  # made of torchvision's


# --- what a model is used for


def test_the_dense_grid_comes_back():
    model, x = patch(make(), "tome", r=6), images()
    tokens = model.forward_features(x)
    grid = unmerge(tokens, model.token_map)
    assert grid.shape == (2, 37, 48)
    for image in range(2):
        torch.testing.assert_close(grid[image], tokens[image][model.token_map.dest[image].long()], rtol=0, atol=0)


def test_image_sizes_and_batches_may_change():
    model = patch(make(dynamic_img_size=True), "tome", r=3)
    for batch, size, tokens in ((2, 48, 37), (1, 64, 65), (3, 16, 5)):
        assert model(images(batch, size)).shape == (batch, 5)
        assert (model.token_map.batch, model.token_map.num_tokens) == (batch, tokens)
        assert model.token_sizes.sum() == batch * tokens


def test_an_empty_batch():
    model = patch(make(), "tome", r=3)
    assert model(images(0)).shape == (0, 5)
    assert (model.token_map.batch, model.token_map.num_out, model.token_sizes.shape) == (0, 25, (0, 25, 1))


def test_fewer_tokens_than_the_prefix_leaves_to_merge():
    model = patch(make("registers", img_size=8), "tome", r=4)  # one patch
    assert model(images(2, 8)).shape == (2, 5)
    assert model.token_map.num_out == 6


def test_gradients_are_those_of_the_paper_written_out():
    model, x = make("registers").double(), images().double()
    target = torch.randn(2, 48).double()
    expected = block_gradients(model, dense_tome.forward(model, x, [5, 5, 5, 5])[0][:, 0].mul(target).sum())
    ours = block_gradients(model, patch(model, "tome", r=5).forward_features(x)[:, 0].mul(target).sum())
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_lowers_the_loss(checkpointing):
    rates = {"drop_path_rate": 0.2, "patch_drop_rate": 0.25, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    model = VisionTransformer(**TINY, **rates).train()
    model.set_grad_checkpointing(checkpointing)
    patch(model, "tome", r=4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    x, labels, losses = images(8), torch.arange(8) % 5, []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert model.token_map.num_tokens == 1 + 27  # after patch dropout
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_checkpointing_gives_the_same_gradients():
    model, x = patch(make(), "tome", r=4).train(), images()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(x).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


def test_distilled_training():
    model = patch(make("distilled"), "tome", r=4).train()
    model.set_distilled_training(True)
    logits, distilled = model(images())
    assert logits.shape == distilled.shape == (2, 5)


def test_copies_and_pickles_are_patched_models_of_their_own():
    model, x = patch(make(), "tome", r=4), images()
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(AttributeError, match="before its first forward"):
            _ = other.token_map
        assert torch.equal(other(x), expected)
        unpatch(other)
    assert torch.equal(model(x), expected)


def test_autocast_keeps_sizes_in_float32():
    model, x = patch(make("q and k norm, layer scale"), "tome", r=5), images()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert model.token_sizes.dtype == torch.float32
    assert (model.token_sizes.sum(1) == 37).all()
    assert y.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(y.float(), expected).min() > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = patch(make(), "tome", r=5).to(dtype)
    assert model(images().to(dtype)).dtype == dtype
    assert model.token_sizes.dtype == torch.float32


def test_attention_without_the_fused_kernel_agrees():
    model, x = patch(make(), "tome", r=5), images()
    expected = model(x)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_hooks_see_the_block():
    model, seen = make(), []
    model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(output))
    patch(model, "tome", r=5)(images())
    x, state, token_map = seen[0]
    assert (x.shape, state.size.shape, token_map.num_out) == ((2, 27, 48), (2, 27, 1), 27)
    assert (state.grid, state.packing) == (None, None)


def test_no_match_and_no_bias_without_a_merge(monkeypatch):
    model = patch(make(), "tome", r=[0, 0, 4, 0])
    biases = []
    real = nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        biases.append(None if attn_mask is None else tuple(attn_mask.shape))
        return real(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, use_backend("auto"):
        model(images())
    assert biases == [None, None, None, (2, 1, 1, 33)]
    calls = sum(event.count for event in profile.key_averages() if event.key == "tokred::bipartite_match")
    assert calls <= 1  # none where the reference serves, because it is called directly
