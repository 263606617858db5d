# SPDX-License-Identifier: MIT
"""patch, unpatch and patched_method: methods and their settings, replacing and saving them, and what can be patched."""

import dataclasses
import json
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from method_settings import METHODS as SETTINGS
from torch import nn

import tokred_kernels as tk
from tokred_kernels import patch, patched_method, patching, unpatch
from tokred_kernels.methods.method import Method
from tokred_kernels.methods.tomesd import ToMeSD
from tokred_kernels.models.imports import import_timm
from tokred_kernels.models.spec import PATCH_INFO

TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
# Settings that differ from the defaults, in the form in which the dataclass stores them.
STORED = {
    "tome": tk.methods.ToMe((5, -0.5), trace=False),
    "tome, a list": tk.methods.ToMe([5, 4, 0, 2], prop_attn=False),
    "algm": tk.methods.ALGM((0, 2, 3), threshold=0.2, global_threshold=(0.5, 0.6), count=(1, 2, 3)),
    "dynamicvit": tk.methods.DynamicViT([1, 2], [0.7, 0.5]),
    "evit": tk.methods.EViT([0.7, 0.5], (1, 2), fuse=False, importance="mean"),
    "diffrate": tk.methods.DiffRate(SETTINGS["diffrate"]["kept"]),
    "diffrate, learned": tk.methods.DiffRate(granularity=2, frozen=[0, -1]),
}


def make():
    return import_timm().models.vision_transformer.VisionTransformer(**TINY).eval()


def saved(method):
    """What a file would give back."""
    return json.loads(json.dumps({"method": method.name, **dataclasses.asdict(method)}))


def test_patching_twice_and_unpatching_nothing():
    model = make()
    with pytest.raises(ValueError, match="this VisionTransformer is not patched"):
        unpatch(model)
    patch(model, "tome", r=4)
    with pytest.raises(ValueError, match=r'already patched \("tome", r=4.*unpatch\(model\) first'):
        patch(model, "tome", r=8)
    patch(unpatch(model), "tome", r=8)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got str"):
        unpatch("model")


def test_wrong_methods_and_settings():
    known = "a method of tokred_kernels.methods or one of "
    known += "'tome', 'algm', 'dynamicvit', 'evit', 'diffrate', 'tomesd', 'lookupvit'"
    with pytest.raises(ValueError, match=f"method must be {known}, got 'tome2'"):
        patch(make(), "tome2", r=1)
    with pytest.raises(TypeError, match="prop_attn must be True or False, got 'no'"):
        patch(make(), "tome", r=1, prop_attn="no")
    with pytest.raises(TypeError, match="trace"):
        patch(make(), "tome", r=1, trace=None)
    for method, setting in (("tome", "r"), ("lookupvit", "grid")):
        with pytest.raises(
            TypeError, match=rf'"{method}" needs the setting {setting}: patch.model, "{method}", {setting}='
        ):
            patch(make(), method)


@pytest.mark.parametrize(
    ("method", "defaults"), [("algm", r"\(0, 4\)"), ("evit", r"\(3, 6, 9\)"), ("dynamicvit", r"\(3, 6, 9\)")]
)
def test_errors_about_defaults_say_so(method, defaults):
    model = make()
    with pytest.raises(ValueError, match=rf"from the default layers={defaults}; give layers for this model"):
        patch(model, method)
    assert type(model) is import_timm().models.vision_transformer.VisionTransformer
    with pytest.raises(ValueError, match=r"got 7$"):
        patch(model, method, layers=(1, 2, 7))


def test_an_error_about_default_shares_says_so():
    with pytest.raises(
        ValueError, match=r"one number for each of 2 layers, got 3 from the default keep=\(0.7, 0.49, 0.343\)"
    ):
        patch(make(), "dynamicvit", layers=(1, 2))


@dataclasses.dataclass(frozen=True)
class Loud(Method):
    """A method that patches the `unet` or `transformer` of anything, and records its calls."""

    name: ClassVar[str] = "shout"
    calls: ClassVar[list] = []

    loud: bool = True

    patched_module = ToMeSD.patched_module

    def apply(self, module, reusable=()):
        setattr(module, PATCH_INFO, Info(self))
        self.calls.append((module, self.loud))


class Info:
    def __init__(self, method):
        self.method = method

    def __str__(self):
        return str(self.method)

    def remove(self, module):
        delattr(module, PATCH_INFO)


@pytest.fixture
def shout(monkeypatch):
    monkeypatch.setitem(patching.METHODS, "shout", Loud)
    monkeypatch.setattr(Loud, "calls", [])
    return Loud


@pytest.mark.parametrize("inside", ["unet", "transformer"])
def test_a_pipeline_is_patched_and_unpatched_inside(shout, inside):
    part = nn.Linear(2, 2)
    pipeline = SimpleNamespace(**{inside: part, "vae": nn.Linear(1, 1)})
    assert patched_method(pipeline) is None
    assert patch(pipeline, "shout", loud=False) is pipeline
    assert shout.calls == [(part, False)]
    assert patched_method(pipeline) == Loud(False)
    with pytest.raises(ValueError, match=r'already patched \("shout", loud=False\)'):
        patch(pipeline, "shout")
    with pytest.raises(ValueError, match=r'already patched \("shout", loud=False\)'):
        patch(part, "shout")
    assert unpatch(pipeline) is pipeline
    assert not hasattr(part, PATCH_INFO)
    with pytest.raises(ValueError, match="this SimpleNamespace is not patched"):
        unpatch(pipeline)


def test_what_cannot_be_patched_at_all(shout):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, .*got SimpleNamespace"):
        patch(SimpleNamespace(vae=nn.Linear(1, 1)), "shout")
    for function in (unpatch, patched_method):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got SimpleNamespace"):
            function(SimpleNamespace(vae=nn.Linear(1, 1)))


def test_unknown_settings_are_named_with_the_known_ones(shout):
    with pytest.raises(TypeError, match='a setting of "shout" must be one of loud, got quiet'):
        patch(nn.Linear(1, 1), "shout", quiet=True)
    with pytest.raises(TypeError, match='a setting of "tome" must be one of r, inflect, prop_attn, trace, got ratio'):
        patch(make(), "tome", r=4, ratio=0.5)
    with pytest.raises(TypeError, match=r"settings must be given to ToMe\(\.\.\.\), got trace"):
        patch(make(), tk.methods.ToMe(4), trace=False)


@pytest.mark.parametrize("kind", patching.METHODS.values())
def test_every_setting_is_documented(kind):
    for field in dataclasses.fields(kind):
        assert f"        {field.name}: " in kind.__doc__, field.name


# --- the dataclass


@pytest.mark.parametrize("name", SETTINGS)
def test_a_name_with_settings_is_the_dataclass(name):
    method = patching.METHODS[name](**SETTINGS[name])
    one, other, x = make(), make(), torch.randn(2, 3, 48, 48)
    other.load_state_dict(one.state_dict())
    patch(one, name, **SETTINGS[name])
    patch(other, method)
    assert patched_method(one) == patched_method(other) == method
    other.load_state_dict(one.state_dict())  # predictors
    assert torch.equal(one(x), other(x))
    assert patched_method(unpatch(one)) is None


@pytest.mark.parametrize("name", STORED)
def test_a_saved_method_is_put_back(name):
    method = STORED[name]
    again = patch(make(), **saved(method))
    assert patched_method(again) == method
    assert saved(patched_method(again)) == saved(method)


def test_calibrated_thresholds_are_saved_as_numbers():
    found = tk.Thresholds({layer: tk.methods.algm.Similarity(0.5, 0.1 * layer, 9) for layer in range(4)})
    method = tk.methods.ALGM((1, 2, 3), threshold=found, global_threshold=found)
    assert (method.threshold, method.global_threshold) == (0.6, (0.7, 0.5 + 0.1 * 3))
    assert patched_method(patch(make(), **saved(method))) == method


def test_a_file_of_counts_is_saved_as_counts(tmp_path):
    file = tmp_path / "kept.json"
    file.write_text(json.dumps(SETTINGS["diffrate"]["kept"]))
    method = tk.methods.DiffRate(file)
    assert method == tk.methods.DiffRate(SETTINGS["diffrate"]["kept"])
    file.unlink()
    assert patched_method(patch(make(), **saved(method))) == method


def test_a_generator_is_replaced_before_saving():
    method = tk.methods.ToMeSD(0.25, stride=[2, 3], generator=torch.Generator())
    kept = saved(dataclasses.replace(method, generator=None))
    assert patching.METHODS[kept.pop("method")](**{**kept, "generator": method.generator}) == method


# --- replace


@pytest.mark.parametrize("after", SETTINGS)
@pytest.mark.parametrize("before", SETTINGS)
def test_replace_is_unpatch_and_patch(before, after):
    model, x = make(), torch.randn(2, 3, 48, 48)
    plain, keys = model(x), list(model.state_dict())
    patch(model, before, **SETTINGS[before])(x)
    torch.manual_seed(1)
    assert patch(model, after, **SETTINGS[after], replace=True) is model
    got, state = model(x), model.state_dict()
    torch.manual_seed(1)
    expected = patch(unpatch(model), after, **SETTINGS[after])
    expected.load_state_dict(state)  # also that both have the same keys
    assert torch.equal(expected(x), got)
    assert torch.equal(unpatch(model)(x), plain)
    assert list(model.state_dict()) == keys


def test_replace_changes_settings_and_keeps_trained_modules():
    model, x = make(), torch.randn(2, 3, 48, 48)
    patch(model, "tome", r=4, replace=True)(x)  # it was not patched
    assert model.token_map.num_out == 37 - 16
    patch(model, "tome", r=2, replace=True)(x)
    assert model.token_map.num_out == 37 - 8

    predictors = patch(model, "dynamicvit", layers=(1, 2), keep=(0.7, 0.5), replace=True).score_predictor
    assert patch(model, "dynamicvit", layers=(1, 3), keep=(0.5, 0.25), replace=True).score_predictor is predictors
    model(x)
    assert model.token_map.num_out == 1 + 9
    assert patch(model, "dynamicvit", layers=(1,), keep=0.5, replace=True).score_predictor is not predictors
    assert len(model.score_predictor) == 1

    patch(model, "diffrate", replace=True)
    assert not hasattr(model, "score_predictor")
    rates = [(block.prune_ddp, block.merge_ddp) for block in model.blocks]
    patch(model, "diffrate", prop_attn=False, frozen=(0, -1), replace=True)
    pairs = zip(model.blocks, rates, strict=True)
    kept = [block.prune_ddp is rate and block.merge_ddp is other for block, (rate, other) in pairs]
    assert kept == [True, True, True, False]  # the last one is frozen now, and has other candidates
    patch(model, "diffrate", granularity=2, replace=True)
    assert model.blocks[1].prune_ddp is not rates[1][0]  # the first block, frozen, has a single candidate in any case


def test_a_failed_replace_changes_nothing():
    model, x = make(), torch.randn(2, 3, 48, 48)
    patch(model, "dynamicvit", layers=(1, 2), keep=(0.7, 0.5))
    expected, method, predictors = model(x), patched_method(model), model.score_predictor
    for bad in ({"method": "evit", "layers": (9,)}, {"method": "tome", "r": [1]}, {"method": "tomesd"}):
        with pytest.raises((ValueError, NotImplementedError)):
            patch(model, **bad, replace=True)
        assert patched_method(model) is method
        assert model.score_predictor is predictors
        assert model.token_map.num_out == 1 + 18  # of the last forward
        assert torch.equal(model(x), expected)
    model.blocks[1].forward = model.blocks[1].forward
    with pytest.raises(RuntimeError, match=r"the forward of blocks\.1 has been replaced"):
        patch(model, "tome", r=1, replace=True)
    assert patched_method(model) is method


def test_a_patched_model_runs_on():
    model, x = make(), torch.randn(2, 3, 48, 48)
    expected = model(x)
    for method, settings in (("tome", {"r": 4}), ("algm", {"layers": (0, 2), "threshold": -1.0})):
        assert not torch.equal(patch(model, method, **settings)(x), expected)
        assert torch.equal(unpatch(model)(x), expected)
