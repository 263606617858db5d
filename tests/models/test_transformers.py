# SPDX-License-Identifier: MIT
"""Models of Hugging Face's transformers: what a patch gives, leaves as it was, and refuses."""

import copy
import gc
import inspect
import pickle
import sys
import weakref

import pytest
import torch
from hf_models import DEPTH, MODELS, images, make, result, transformers
from method_settings import METHODS
from torch import nn

from tokred_kernels import diffrate_search, flops, set_keep_rate, unmerge
from tokred_kernels.models.base import model_spec
from tokred_kernels.models.patched import Patched
from tokred_kernels.patching import patch, unpatch

PREFIX = {"deit": 2, "deit, distilled": 2, "dinov2, registers": 5, "dinov3": 5, "ijepa": 0, "siglip": 0}
PREFIX |= {"siglip, encoder": 0}
MEANS = ["ijepa", "dinov2", "dinov2, registers", "clip, classifier", "metaclip_2", "siglip"]

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


def encoder_of(model):
    return model_spec(model).model


def same(outputs, expected):
    pairs = zip(outputs.to_tuple(), expected.to_tuple(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_r_0_changes_nothing_and_unpatch_takes_all_out(name):
    model, x = make(name), images()
    classes = [type(module) for module in model.modules()]
    expected, keys, settings = model(x), list(model.state_dict()), dict(vars(model))
    assert patch(model, "tome", r=0) is model
    assert same(model(x), expected) and list(model.state_dict()) == keys
    unpatch(patch(unpatch(model), "tome", r=5))
    assert same(model(x), expected)
    assert [type(module) for module in model.modules()] == classes and dict(vars(model)) == settings


@pytest.mark.parametrize("name", MODELS)
def test_tokens_go_and_their_map_stays(name):
    model, x, prefix = patch(make(name), "tome", r=5), images(), PREFIX.get(name, 1)
    tokens = 36 + prefix
    outputs = model(x, output_hidden_states=True)
    counts = [state.shape[1] for state in outputs.hidden_states]
    assert counts == [tokens - 5 * layer for layer in range(DEPTH + 1)]
    assert (model.token_map.num_tokens, model.token_map.num_out) == (tokens, tokens - 5 * DEPTH)
    assert (model.token_sizes.sum(1) == tokens).all()
    assert (model.token_map.dest[:, :prefix] == torch.arange(prefix)).all()
    assert encoder_of(model).num_prefix_tokens == prefix
    final = encoder_of(model)(x).last_hidden_state
    assert unmerge(final, model.token_map).shape == (2, tokens, 48)


@pytest.mark.parametrize("name", MEANS)
def test_classifiers_of_means_count_tokens_by_what_they_stand_for(name):
    model, x = patch(make(name), "tome", r=[30, 6, 0, 0]), images()
    logits = model(x).logits
    tokens = unmerge(encoder_of(model)(x).last_hidden_state, model.token_map)
    mean = tokens[:, PREFIX.get(name, 1) :].mean(1)
    if name.startswith("dinov2"):
        mean = torch.cat([tokens[:, 0], mean], 1)
    torch.testing.assert_close(logits, model.classifier(mean))
    labels = torch.tensor([1, 3])
    torch.testing.assert_close(model(x, labels).loss, nn.functional.cross_entropy(logits, labels))
    torch.testing.assert_close(model(pixel_values=x, labels=labels).loss, nn.functional.cross_entropy(logits, labels))


def test_masked_tokens_have_no_part_in_a_mean():
    model, x = patch(make("clip, classifier"), "dynamicvit", layers=(1, 2), keep=(0.6, 0.3)).train(), images()
    torch.manual_seed(3)
    logits = model(x).logits
    kept = model.token_decisions[-1].unsqueeze(-1)
    torch.manual_seed(3)
    tokens = encoder_of(model)(x).last_hidden_state[:, 1:]
    torch.testing.assert_close(logits, model.classifier((tokens * kept).sum(1) / kept.sum(1)))


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_tuples_where_these_are_asked_for(name):
    model, x = patch(make(name), "tome", r=5), images()
    expected = model(x).to_tuple()
    given = model(x, return_dict=False)
    assert isinstance(given, tuple) and all(map(torch.equal, given, expected)) and len(given) == len(expected)


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip", "siglip, encoder", "clip, projection"])
def test_copies_pickles_and_checkpoints(name, tmp_path):
    model, x = patch(make(name), "tome", r=5), images()
    expected, named = model(x), str(type(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(other(x), expected)
        assert other.token_map.num_out == model.token_map.num_out
    model.save_pretrained(tmp_path)
    loaded = type(unpatch(model)).from_pretrained(tmp_path)
    assert str(type(loaded)) == named and loaded.config.architectures == [type(model).__name__]
    assert same(patch(loaded.eval(), "tome", r=5)(x), expected)


def test_what_others_ask_of_a_class():
    """Trainers look at the signature of a forward, and wrappers that shard a model at the names of its layers."""
    for name in ("vit", "clip, classifier", "vit, encoder"):
        plain = make(name)
        signature = inspect.signature(plain.forward)
        patched = patch(plain, "tome", r=2)
        assert inspect.signature(patched.forward) == signature
    layer = patched.layers[0]
    assert type(layer).__name__ in patched._no_split_modules and "PatchedViTLayer" in repr(patched)


@pytest.mark.parametrize("name", MODELS)
def test_compiled_without_graph_breaks(name):
    model, x = patch(make(name), "tome", r=5), images()
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(result(compiled(x)), result(expected))
    assert model.token_map.num_out == model.token_map.num_tokens - 5 * DEPTH


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip, encoder"])
def test_compiled_layer_by_layer(name):
    model, x = patch(make(name), "tome", r=5), images()
    expected = result(model(x))
    for layer in model_spec(model).blocks:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(result(model(x)), expected)


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip, encoder"])
def test_exported(name):
    model, x = patch(make(name), "tome", r=5, trace=False), images()
    with torch.no_grad():
        exported = torch.export.export(model, (x,), strict=False).module()
        torch.testing.assert_close(result(exported(x)), result(model(x)))


@pytest.mark.parametrize("method", ["tome", "dynamicvit"])
@pytest.mark.parametrize("name", ["vit", "dinov2", "clip, classifier"])
def test_gradients_are_the_same_with_checkpointing(name, method):
    settings = {"r": 5} if method == "tome" else {"layers": (1, 2), "keep": (0.7, 0.5)}
    model, x = patch(make(name), method, **settings).train(), images()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        loss = result(model(x)).square().sum() + sum(decision.sum() for decision in model.token_decisions)
        loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-4, msg=key)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20


@pytest.mark.parametrize(("name", "method"), [("dinov3", "tome"), ("vit", "dynamicvit"), ("vit", "learned")])
@pytest.mark.parametrize("backward", [True, False])
def test_checkpointing_lets_go_of_what_it_kept(name, method, backward):
    model = make(name)
    method, settings = ("diffrate", {}) if method == "learned" else (method, METHODS[method])
    patch(model, method, **settings).train().gradient_checkpointing_enable()
    seen = []

    last = [module for module in model.modules() if type(module).__name__.endswith("Layer")][-1]
    last.register_forward_pre_hook(lambda layer, args: seen.append(weakref.ref(args[0])))
    for _ in range(4):
        y = result(model(images()))
        if backward:
            y.square().sum().backward()
        del y
    gc.collect()
    assert sum(one() is not None for one in seen) <= 1  # the last forward's record may hold its own


def test_sizes_take_no_gradients_that_nobody_asked_for():
    model = patch(make("vit"), "tome", r=5).train()
    assert model(images()).logits.requires_grad and not model.token_sizes.requires_grad


@pytest.mark.parametrize("method", ["tome", "evit"])
def test_reentrant_checkpointing_is_right_or_refused(method):
    model, x = patch(make("vit"), method, **METHODS[method]).train(), images().requires_grad_()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        result(model(x)).square().sum().backward()
        found.append(model.vit.layers[0].mlp.fc1.weight.grad)
        model.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    patch(unpatch(model), "dynamicvit", **METHODS["dynamicvit"])
    with pytest.raises(RuntimeError, match=r'reentrant checkpointing drops the gradients.*"use_reentrant": False'):
        model(x)
    model.eval()(x)


def test_a_head_that_leaves_tokens_as_they_are():
    model, x = make("siglip, encoder"), images()
    model.head = nn.Identity()
    assert flops.count(model).head == 0
    outputs = patch(model, "tome", r=5)(x)
    assert torch.equal(outputs.pooler_output, outputs.last_hidden_state)
    unpatch(model).head = nn.Linear(48, 48)
    with pytest.raises(NotImplementedError, match=r"the head of this SiglipVisionModel is a torch.nn.*Linear"):
        patch(model, "tome", r=5)
    assert not isinstance(model.encoder.layers[0], Patched)


@pytest.mark.parametrize("name", ["dinov2", "siglip"])
def test_an_encoder_may_be_compiled_after(name):
    model, x = patch(make(name), "tome", r=[30, 6, 0, 0]), images()
    expected, own = model(x).logits, "dinov2" if name == "dinov2" else "vision_model"
    setattr(model, own, torch.compile(getattr(model, own), backend="eager"))
    torch.testing.assert_close(model(x).logits, expected)
    assert model.token_map.num_out == model.token_map.num_tokens - 24


@pytest.mark.parametrize("name", MEANS)
def test_mean_classifiers_are_called_as_before(name):
    model, x, labels = make(name), images(), torch.tensor([1, 2])
    names = list(inspect.signature(model.forward).parameters)
    positional = [x, labels, *([True] if "interpolate_pos_encoding" in names[2:3] else [])]
    expected = model(*positional)
    weighted = model(x, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    patch(model, "tome", r=0)
    assert same(model(*positional), expected)
    assert torch.equal(model(x, labels=labels, num_items_in_batch=torch.tensor(7)).loss, weighted)


def test_layers_may_be_taken_out_and_put_in():
    model, x = patch(make("vit"), "tome", r=5), images()
    del model.vit.layers[1]
    model.vit.layers.append(copy.deepcopy(model.vit.layers[0]))
    model.vit.layers.append(model.vit.layers[1])
    model(x)
    assert model.token_map.num_out == 37 - 5 * (DEPTH + 1)
    none = make("vit", num_hidden_layers=0)
    expected = none(x)
    assert same(patch(none, "tome", r=0)(x), expected)


def test_predictors_are_where_the_encoder_is():
    model = transformers.CLIPModel(transformers.CLIPConfig(**MODELS["clip, classifier"][2])).eval()
    model.vision_model.double()
    patch(model, "dynamicvit", layers=(1, 2), keep=0.5)
    assert model.vision_model(images(dtype=torch.float64)).pooler_output.dtype == torch.float64


def test_eager_attention_and_its_dropout():
    fused, x = patch(make("vit"), "tome", r=5), images()
    eager = patch(make("vit", attn_implementation="eager"), "tome", r=5)
    eager.load_state_dict(fused.state_dict())
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(x).logits, fused(x).logits)
    dropping = patch(make("vit", attention_probs_dropout_prob=0.5), "tome", r=5)
    assert torch.equal(dropping(x).logits, dropping(x).logits)
    dropping.train()
    assert not torch.equal(dropping(x).logits, dropping(x).logits)


def test_two_towers():
    model = transformers.CLIPModel(transformers.CLIPConfig(**MODELS["clip, classifier"][2])).eval()
    words, x = torch.tensor([[1, 5, 6, 2]]), images()
    text = model.get_text_features(input_ids=words)
    plain = model.get_image_features(pixel_values=x)
    patch(model, "tome", r=5)
    outputs = model(input_ids=words, pixel_values=x)
    assert outputs.logits_per_image.shape == (2, 1) and model.token_map.num_out == 37 - 5 * DEPTH
    assert same(model.get_text_features(input_ids=words), text)
    assert not torch.equal(result(model.get_image_features(pixel_values=x)), result(plain))


def test_keep_rates_follow_a_schedule():
    model, x = patch(make("vit"), "evit", layers=(1,), keep_rate=0.9), images()
    model(x)
    before = model.token_map.num_out
    set_keep_rate(model, 0.5)
    model(x)
    assert (before, model.token_map.num_out) == (1 + 33 + 1, 1 + 18 + 1)
    assert "keep_rate=0.5" in str(model.tokred_patch)


def test_predictors_are_the_encoders():
    model = patch(make("vit"), "dynamicvit", layers=(1, 2), keep=(0.7, 0.5))
    assert any(key.startswith("vit.score_predictor.1.") for key in model.state_dict())
    assert not any("score_predictor" in key for key in unpatch(model).state_dict())


def refusal(name, method):
    """Return why a model of this name cannot be patched with the method; None if it can."""
    if method in ("evit", "diffrate") and PREFIX.get(name, 1) == 0:
        return "without a class token|and this model has none"
    return "pools its tokens by attention" if method == "dynamicvit" and name.startswith("siglip") else None


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name in MODELS for method in (None, *METHODS) if not refusal(name, method)]
)
def test_operations_are_those_that_torch_counts(name, method):
    model, x = make(name), images(batch=1)
    if method is not None:
        patch(model, method, **METHODS[method])
    with flops.counter(display=False) as counter, torch.no_grad():
        model(x)
    counted = flops.count(model)
    assert counted.total == pytest.approx(counter.get_total_flops(), rel=1e-9)
    left = 36 + PREFIX.get(name, 1) if method is None else model.token_map.num_out
    assert counted.tokens[-1] == left


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name in MODELS for method in METHODS if refusal(name, method)]
)
def test_methods_that_a_model_cannot_have(name, method):
    with pytest.raises((ValueError, NotImplementedError), match=refusal(name, method)):
        patch(make(name), method, **METHODS[method])


def test_operations_of_the_image_tower_alone():
    model = transformers.CLIPModel(transformers.CLIPConfig(**MODELS["clip, classifier"][2])).eval()
    with flops.counter(display=False) as counter, torch.no_grad():
        model.get_image_features(pixel_values=images(batch=1))
    assert flops.count(model).total == counter.get_total_flops()
    assert flops.count(model, 96).tokens[0] == 1 + 12 * 12


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3"])
def test_counts_are_learned(name):
    model, plain = make(name), make(name)
    plain.load_state_dict(model.state_dict())
    target = 0.7 * flops.count(model).gflops
    batches = [(images(), torch.tensor([0, 1]))] * 2

    def loss(outputs, labels):
        return nn.functional.cross_entropy(outputs.pooler_output[:, :5] if name == "dinov3" else outputs, labels)

    found = diffrate_search(model, batches, target, steps=3, lr=0.1, criterion=loss, tolerance=1.0, progress=False)
    assert found.gflops == pytest.approx(flops.count(model).gflops)
    assert min(found.merge_kept_num) < 36 + PREFIX.get(name, 1)
    x = images()
    with torch.no_grad():
        expected = result(patch(plain, "diffrate", kept=found._asdict())(x))
        torch.testing.assert_close(result(model(x)), expected)
    assert list(unpatch(model).state_dict()) == list(unpatch(plain).state_dict())


def test_images_of_other_sizes():
    model = patch(make("vit"), "algm", layers=(0,), threshold=-1.0)
    model(torch.randn(1, 3, 32, 64), interpolate_pos_encoding=True)
    assert model.token_map.num_out == 1 + (4 * 8) // 4


def test_an_encoder_may_be_unpatched_by_itself():
    model, x = make("clip, classifier"), images()
    expected = model(x)
    unpatch(patch(model, "tome", r=5).vision_model)
    assert same(model(x), expected)
    with pytest.raises(ValueError, match="this CLIPForImageClassification is not patched"):
        unpatch(model)
    assert patch(model, "tome", r=5)(x).logits.shape == (2, 5) and model.token_map.num_out == 17
    assert same(unpatch(model)(x), expected)


class Own(transformers.ViTModel):
    pass


def replaced(name="vit", part="vit.layers.1"):
    model = make(name)
    model.get_submodule(part).forward = lambda *_, **__: None
    return model


def other_encoder():
    model = make("vit")
    model.vit = Own(model.config)
    return model


def other_layer():
    model = make("vit")
    model.vit.layers[2] = nn.Identity()
    return model


@pytest.mark.parametrize(
    ("build", "method", "error", "message"),
    [
        (
            lambda: Own(transformers.ViTConfig()),
            "tome",
            NotImplementedError,
            r"Own is not supported; supported are timm's.*transformers'",
        ),
        (
            lambda: transformers.BeitModel(transformers.BeitConfig()),
            "tome",
            NotImplementedError,
            "BeitModel is not supp",
        ),
        (
            lambda: transformers.ViTForMaskedImageModeling(transformers.ViTConfig()),
            "tome",
            NotImplementedError,
            "ViTForMaskedImageModeling is not supported.*give the ViTModel inside it",
        ),
        (lambda: nn.Sequential(make("vit, encoder")), "tome", NotImplementedError, "give the ViTModel inside it"),
        (replaced, "tome", RuntimeError, "the forward of vit.layers.1 has been replaced"),
        (lambda: replaced("siglip", "vision_model.head"), "tome", RuntimeError, "the forward of vision_model.head has"),
        (lambda: replaced("siglip", ""), "tome", RuntimeError, "the forward of SiglipForImageClassification has been"),
        (other_encoder, "tome", NotImplementedError, "this ViTForImageClassification has a .*Own as its encoder"),
        (
            other_layer,
            "tome",
            NotImplementedError,
            "layer 2 of this ViTModel has a torch.nn.*Identity instead of a ViTLayer",
        ),
        (lambda: make("siglip"), "diffrate", NotImplementedError, "class token, and this model has none"),
        (lambda: make("siglip"), "dynamicvit", NotImplementedError, "pools its tokens by attention"),
        (lambda: make("siglip"), "evit", ValueError, 'must be "mean"'),
        (
            lambda: make("vit"),
            "lookupvit",
            NotImplementedError,
            "no counterpart for a .*ViTForImageCl",
        ),
    ],
)
def test_what_is_refused(build, method, error, message):
    model, settings = build(), {"tome": {"r": 2}, "lookupvit": {"grid": (2, 2)}}.get(method, {})
    classes = [type(module) for module in model.modules()]
    settings |= {"layers": (1, 2), "keep": (0.7, 0.5)} if method == "dynamicvit" else {}
    settings |= {"layers": (1, 2)} if method == "evit" else {}
    with pytest.raises(error, match=message):
        patch(model, method, **settings)
    assert [type(module) for module in model.modules()] == classes


def test_more_that_is_refused(monkeypatch):
    model, x = make("vit"), images()
    with pytest.raises(NotImplementedError, match='count="image" packs tokens'):
        patch(model, "algm", layers=(0, 2), count="image")
    patch(model.vit, "tome", r=2)
    with pytest.raises(ValueError, match=r'the ViTModel inside is already patched \("tome", r=2'):
        patch(model, "tome", r=2)
    with pytest.raises(ValueError, match="is not patched, but the ViTModel inside it is: give that"):
        unpatch(nn.Sequential(model))
    with pytest.raises(ValueError, match=r'the ViTModel inside this Sequential is already patched \("tome", r=2'):
        patch(nn.Sequential(model), "tome", r=2)
    unpatch(model.vit)
    patch(model, "tome", r=2)
    with pytest.raises(ValueError, match=r'already patched \("tome", r=2'):
        patch(model, "tome", r=2)
    with pytest.raises(NotImplementedError, match="cannot return attentions"):
        model(x, output_attentions=True)
    with pytest.raises(NotImplementedError, match="does not support attention_mask"):
        model(x, attention_mask=torch.tensor([[1] * 36 + [0]] * 2))
    with pytest.raises(TypeError, match="ViTModel takes at most 4 arguments, got 5"):
        model.vit(x, None, None, None, None)
    with pytest.raises(RuntimeError, match="only the patched model itself can call its layers"):
        model.vit.layers[0](torch.randn(2, 37, 48))
    with pytest.raises(AttributeError, match="before its first forward"):
        patch(make("vit"), "tome", r=2).token_map  # noqa: B018
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.9.1")
    with pytest.raises(ImportError, match=r"needs transformers 5.18 or later, got 5.9.1"):
        patch(make("vit"), "tome", r=2)
