# SPDX-License-Identifier: MIT
"""EViT in timm's models: the numbers against a plain rewriting of the paper, and everything a model is used for."""

import copy
import pickle

import pytest
import torch
from algm_models import MODELS, TINY, VisionTransformer, images, make, vit
from pruning_models import LAYERS, dense_pruning, importances, make_evit
from torch import nn

import tokred_kernels as tk
from tokred_kernels.methods import evit
from tokred_kernels.nn import keep_attentive
from tokred_kernels.patching import patch, unpatch

# 36 patches become 26, 19 and 14, each with one fused token.
LEFT = (27, 20, 15)
FUSING = pytest.mark.parametrize("fuse", [True, False], ids=["fuse", "drop"])

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


def assert_is(model, x, expected, sources, **how):
    torch.testing.assert_close(model.forward_features(x), expected, **how)
    torch.testing.assert_close(model.token_map.source(torch.float64), sources, rtol=0, atol=0)
    torch.testing.assert_close(model.token_sizes[..., 0].double(), sources.sum(-1), rtol=0, atol=0)


# --- the numbers


@pytest.mark.parametrize("backend", ["reference", "auto"])
@FUSING
@pytest.mark.parametrize(("name", "importance"), [(name, one) for name in MODELS for one in importances(name)])
def test_equals_the_paper_written_out(name, importance, fuse, backend):
    model, x = make(name).double(), images().double()
    with torch.no_grad():
        expected, sources = dense_pruning.evit(model, x, dict.fromkeys(LAYERS, 0.7), fuse, importance)
        patch(model, "evit", layers=LAYERS, fuse=fuse, importance=importance)
        with tk.use_backend(backend):
            assert_is(model, x, expected, sources, rtol=1e-6, atol=1e-6)
    left = [n + model.num_prefix_tokens for n in (LEFT if fuse else (26, 19, 14))]
    assert model.tokred_trace.left[1:] == tuple(left)


@FUSING
@pytest.mark.parametrize(
    ("layers", "rates"),
    [
        ((0,), 0.5),
        ([1, 3], [0.9, 0.25]),
        ((0, 1, 2, 3), (0.8, 1.0, 0.3, 0.01)),
        ((3,), 1 / 3),
        ((0, 1, 2, 3), 1e-9),  # one token, and what is fused
    ],
    ids=str,
)
def test_settings_are_those_of_the_paper_written_out(layers, rates, fuse):
    model, x = make("registers").double(), images().double()
    each = rates if isinstance(rates, (list, tuple)) else [rates] * len(layers)
    with torch.no_grad():
        expected, sources = dense_pruning.evit(model, x, dict(zip(layers, each, strict=True)), fuse)
        patch(model, "evit", layers=layers, keep_rate=rates, fuse=fuse)
        assert_is(model, x, expected, sources, rtol=1e-6, atol=1e-6)


@FUSING
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (16, 16), (24, 16)], ids=str)
@pytest.mark.parametrize("rate", [0.3, 0.7, 0.99])
def test_few_tokens(size, rate, fuse):
    model, x = make(dynamic_img_size=True).double(), images(2, size).double()
    with torch.no_grad():
        expected, sources = dense_pruning.evit(model, x, dict.fromkeys(LAYERS, rate), fuse)
        patch(model, "evit", layers=LAYERS, keep_rate=rate, fuse=fuse)
        assert_is(model, x, expected, sources, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@FUSING
def test_gradients_in_training_are_those_of_the_paper_written_out(fuse, backend):
    model, x = make("registers").double().train(), images().double()
    tokens, _ = dense_pruning.evit(model, x, dict.fromkeys(LAYERS, 0.7), fuse)
    target = torch.randn_like(tokens)
    tokens.mul(target).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    patch(model, "evit", layers=LAYERS, fuse=fuse)
    with tk.use_backend(backend):
        model.forward_features(x).mul(target).sum().backward()
    assert len(expected) >= len(list(model.blocks.parameters()))
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-7, msg=name)


@FUSING
def test_the_weight_of_what_is_fused_carries_gradient_to_queries_and_keys(fuse, monkeypatch):
    """In the last block alone a query of the class token is in the loss by its attention, and by that weight."""
    model, x = make().double().train(), images().double()
    patch(model, "evit", layers=(3,), fuse=fuse)

    def gradients():
        model.zero_grad()
        model.forward_features(x)[:, -1].sum().mul(100).backward()
        return model.blocks[3].attn.qkv.weight.grad.chunk(3)

    with_weights = gradients()
    monkeypatch.setattr(evit, "keep_attentive", lambda x, worth, *a, **k: keep_attentive(x, worth.detach(), *a, **k))
    without = gradients()
    for ours, theirs in list(zip(with_weights, without, strict=True))[:2]:
        assert (ours - theirs).abs().max() > 1e-3 if fuse else torch.equal(ours, theirs)


def test_the_mean_is_of_the_tokens_that_are_left():
    model, x = make_evit(global_pool="avg"), images()
    tokens = model.forward_features(x)
    torch.testing.assert_close(model.pool(tokens), tokens[:, 1:].mean(1))


@pytest.mark.parametrize("name", MODELS)
def test_a_rate_of_1_changes_nothing(name):
    model, x = make(name), images()
    expected, importance = model(x), importances(name)[0]
    patch(model, "evit", layers=LAYERS, keep_rate=1, importance=importance)
    assert torch.equal(model(x), expected)
    tokens = 36 + model.num_prefix_tokens
    assert torch.equal(model.token_map.dest, torch.arange(tokens, dtype=torch.int32).expand(3, -1))
    assert torch.equal(model.token_sizes, torch.ones(3, tokens, 1))


# --- what a model is used for


@FUSING
def test_the_dense_grid_comes_back(fuse):
    model, x = make_evit("registers", fuse), images()
    tokens = model.forward_features(x)
    grid, dest = tk.unmerge(tokens, model.token_map), model.token_map.dest.long()
    assert grid.shape == (3, 41, 48)
    for image in range(3):
        gone = dest[image] < 0
        assert gone.sum() == (0 if fuse else 36 - 14)
        assert torch.equal(grid[image][~gone], tokens[image][dest[image][~gone]])
        assert (grid[image][gone] == 0).all()
    assert torch.equal(dest[:, :5], torch.arange(5).expand(3, -1))
    assert (model.token_sizes.sum(1) == (41 if fuse else 19)).all()
    assert (model.token_sizes[:, :5] == 1).all()


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_restores_everything(name):
    model, x = make(name), images()
    expected, before = model(x), [(type(m), set(m.__dict__)) for m in model.modules()]
    patch(model, "evit", layers=LAYERS, importance=importances(name)[0])
    assert not torch.equal(model(x), expected)
    assert unpatch(model) is model
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before
    assert torch.equal(model(x), expected)


def test_state_dict_is_the_same():
    model, x = make(), images()
    keys = list(model.state_dict())
    expected = patch(model, "evit", layers=LAYERS)(x)
    assert list(model.state_dict()) == keys
    other = make()
    other.load_state_dict(model.state_dict())
    assert torch.equal(patch(other, "evit", layers=LAYERS)(x), expected)
    third = make_evit()
    third.load_state_dict(unpatch(other).state_dict())
    assert torch.equal(third(x), expected)


def test_copies_and_pickles_are_patched_models_of_their_own():
    model, x = make_evit(), images()
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(AttributeError, match="before its first forward"):
            _ = other.token_map
        assert torch.equal(other(x), expected)
        tk.set_keep_rate(other, 0.5)
        assert not torch.equal(other(x), expected)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("name", "backend", "fuse"), [("vit", "auto", True), ("no prefix", "reference", False)])
def test_compiles_whole(name, backend, fuse):
    model, x = make_evit(name, fuse), images()
    with tk.use_backend(backend):
        expected = model(x)
        expected.square().sum().backward()
        gradients, expected_map = [p.grad.clone() for p in model.parameters()], model.token_map
        model.zero_grad()
        y = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)(x)
        y.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.token_map.dest, expected_map.dest)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_autocast_and_half_precision():
    model, x = make_evit(), images()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert model.token_map.num_out == 1 + LEFT[-1]
    assert nn.functional.cosine_similarity(y.float(), expected).min() > 0.9
    y = model.to(torch.bfloat16)(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert nn.functional.cosine_similarity(y.float(), expected).min() > 0.9


def test_attention_without_the_fused_kernel_agrees():
    model, x = make_evit("q and k norm, layer scale"), images()
    expected = model(x)
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_checkpointing_gives_the_same_gradients():
    model, x = make_evit().train(), images()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing(True)
    model(x).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_lowers_the_loss(checkpointing):
    rates = {"drop_path_rate": 0.2, "patch_drop_rate": 0.25, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    model = VisionTransformer(**TINY, **rates).train()
    model.set_grad_checkpointing(checkpointing)
    patch(model, "evit", layers=LAYERS)
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


@pytest.mark.parametrize("backend", ["reference", "auto"])
@FUSING
@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts(name, fuse, backend):
    model = make_evit(name, fuse).requires_grad_(False)
    with tk.use_backend(backend), tk.flops.counter(display=False) as counter:
        model(images())
    found = tk.flops.count(model)
    assert found.total == pytest.approx(counter.get_total_flops() / 3, rel=1e-9)
    assert found.tokens[-1] == model.token_map.num_out


def test_batches_may_be_empty_and_images_of_any_size():
    model = make_evit()
    assert model(images(0)).shape == (0, 5)
    assert (model.token_map.batch, model.token_sizes.shape) == (0, (0, 1 + LEFT[-1], 1))
    model = make_evit(dynamic_img_size=True)
    for size, tokens in (((64, 32), 33), ((40, 56), 36)):
        assert model(images(2, size)).shape == (2, 5)
        assert model.token_map.num_tokens == tokens
        assert tk.flops.count(model, size).tokens[-1] == model.token_map.num_out


def test_hooks_see_the_state_and_maps_may_be_let_go():
    model, seen = make(), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    patch(model, "evit", layers=(1, 3), trace=False)(images())
    assert [x.shape[1] for x, _, _ in seen] == [37, 28, 28, 21]
    assert [state.grid for _, state, _ in seen] == [(6, 6), None, None, None]
    assert [token_map is None for _, _, token_map in seen] == [True, False, True, False]
    assert all(state.size is None and state.policy is None for _, state, _ in seen)
    for name in ("token_map", "token_sizes"):
        with pytest.raises(AttributeError, match="trace=True"):
            getattr(model, name)


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"keep_rate": 0}, ValueError, "keep_rate must be above 0 and at most 1, got 0"),
        ({"keep_rate": 1.01}, ValueError, "keep_rate must be above 0 and at most 1, got 1.01"),
        ({"keep_rate": -0.5}, ValueError, "keep_rate must be above 0 and at most 1, got -0.5"),
        ({"keep_rate": float("nan")}, ValueError, "keep_rate must be above 0 and at most 1, got nan"),
        ({"keep_rate": [0.7, 0.0]}, ValueError, "keep_rate must be above 0 and at most 1, got 0.0"),
        ({"keep_rate": "0.7"}, TypeError, "keep_rate must be a number, or a list of numbers, got '0.7'"),
        ({"keep_rate": True}, TypeError, "keep_rate must be a number, or a list of numbers, got True"),
        ({"keep_rate": None}, TypeError, "keep_rate must be a number, or a list of numbers, got None"),
        ({"keep_rate": [0.7, "1"]}, TypeError, r"keep_rate must be a number, or a list of numbers, got \[0.7, '1'\]"),
        ({"keep_rate": [0.7]}, ValueError, "keep_rate must have one number for each of 2 layers, got 1"),
        ({"keep_rate": [0.7] * 3}, ValueError, "keep_rate must have one number for each of 2 layers, got 3"),
        ({"layers": ()}, ValueError, "layers must name at least one block, got none"),
        ({"layers": 3}, TypeError, "layers must be a tuple of ints, got 3"),
        ({"layers": (1, 4)}, ValueError, "layers must be from 0 to 3, the model's last block, got 4"),
        ({"layers": (-1, 2)}, ValueError, "layers must be at least 0, got -1"),
        ({"layers": (2, 1)}, ValueError, r"layers must ascend, got \(2, 1\)"),
        ({"layers": (1, 1)}, ValueError, r"layers must ascend, got \(1, 1\)"),
        ({"layers": (1, 2.0)}, TypeError, r"layers must be an int, got float \(2.0\)"),
        ({"importance": "last"}, ValueError, "importance must be one of class, mean, got 'last'"),
        ({"importance": None}, TypeError, "importance must be one of class, mean, got None"),
        ({"fuse": 1}, TypeError, "fuse must be True or False, got 1"),
        ({"trace": None}, TypeError, "trace must be True or False, got None"),
        ({"r": 8}, TypeError, 'a setting of "evit" must be one of keep_rate, layers, fuse, importance, trace, got r'),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_settings(settings, error, message):
    model = make()
    with pytest.raises(error, match=f"tokred_kernels.(patch|methods.EViT): {message}"):
        patch(model, "evit", **{"layers": (1, 3), **settings})
    assert type(model) is VisionTransformer  # left as it was
    assert type(model.blocks[0]) is vit.Block


def test_the_class_token_must_be_there():
    model = make("no prefix")
    with pytest.raises(ValueError, match='importance must be "mean" for a model without a class token, got "class"'):
        patch(model, "evit", layers=LAYERS)
    with pytest.raises(
        ValueError, match=r'already patched \("evit", keep_rate=0.7, layers=\(1, 2, 3\), fuse=True, imp'
    ):
        patch(patch(model, "evit", layers=LAYERS, importance="mean"), "evit")
