# SPDX-License-Identifier: MIT
"""patch and unpatch themselves: which methods and settings there are, and where a patch is put and found again."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from tokred_kernels import patch as patch_function
from tokred_kernels.models.imports import import_timm
from tokred_kernels.patching import MARK, METHODS, patch, unpatch

TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}


def make():
    return import_timm().models.vision_transformer.VisionTransformer(**TINY).eval()


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
    known = "'tome', 'algm', 'dynamicvit', 'evit', 'diffrate', 'tomesd', 'lookupvit'"
    with pytest.raises(ValueError, match=f"method must be one of {known}, got 'tome2'"):
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
    ("method", "defaults"), [("algm", r"\(1, 5\)"), ("evit", r"\(3, 6, 9\)"), ("dynamicvit", r"\(3, 6, 9\)")]
)
def test_errors_about_defaults_say_so(method, defaults):
    model = make()
    with pytest.raises(ValueError, match=rf"from the default layers={defaults}; give layers for this model"):
        patch(model, method)
    assert type(model) is import_timm().models.vision_transformer.VisionTransformer
    with pytest.raises(ValueError, match=r"got 7$"):
        patch(model, method, layers=(1, 7))


def test_an_error_about_default_shares_says_so():
    with pytest.raises(
        ValueError, match=r"one number for each of 2 layers, got 3 from the default keep=\(0.7, 0.49, 0.343\)"
    ):
        patch(make(), "dynamicvit", layers=(1, 2))


@pytest.fixture
def shout(monkeypatch):
    """A method that takes whatever has a `unet` or a `transformer`, and says what it was given."""
    module = ModuleType("shouting")

    class Mark:
        def __str__(self):
            return '"shout"'

        def remove(self, model):
            delattr(model, MARK)

    def apply(model, *, loud=True):
        setattr(model, MARK, Mark())
        module.given = model, loud

    def resolve(model):
        return getattr(model, "unet", None) or getattr(model, "transformer", None) or model

    module.apply, module.resolve = apply, resolve
    monkeypatch.setitem(sys.modules, "shouting", module)
    monkeypatch.setitem(METHODS, "shout", "shouting")
    return module


@pytest.mark.parametrize("inside", ["unet", "transformer"])
def test_a_pipeline_is_patched_and_unpatched_inside(shout, inside):
    part = nn.Linear(2, 2)
    pipeline = SimpleNamespace(**{inside: part, "vae": nn.Linear(1, 1)})
    assert patch(pipeline, "shout", loud=False) is pipeline
    assert shout.given == (part, False)
    assert hasattr(part, MARK)
    with pytest.raises(ValueError, match=r'already patched \("shout"\)'):
        patch(pipeline, "shout")
    with pytest.raises(ValueError, match=r'already patched \("shout"\)'):
        patch(part, "shout")
    assert unpatch(pipeline) is pipeline
    assert not hasattr(part, MARK)
    with pytest.raises(ValueError, match="this SimpleNamespace is not patched"):
        unpatch(pipeline)


def test_what_cannot_be_patched_at_all(shout):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got SimpleNamespace"):
        patch(SimpleNamespace(vae=nn.Linear(1, 1)), "shout")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got SimpleNamespace"):
        unpatch(SimpleNamespace(vae=nn.Linear(1, 1)))


def test_unknown_settings_are_named_with_those_there_are(shout):
    with pytest.raises(TypeError, match='a setting of "shout" must be one of loud, got quiet'):
        patch(nn.Linear(1, 1), "shout", quiet=True)
    with pytest.raises(TypeError, match='a setting of "tome" must be one of r, prop_attn, trace, got ratio'):
        patch(make(), "tome", r=4, ratio=0.5)


@pytest.mark.parametrize("method", ["tome", "algm", "dynamicvit", "evit", "diffrate", "lookupvit"])
def test_every_setting_is_documented_in_both_places(method):
    from importlib import import_module
    from inspect import signature

    apply = import_module(METHODS[method]).apply
    section = patch_function.__doc__.partition(f'"{method}", ')[2].partition('"tome')[0]
    for name in list(signature(apply).parameters)[1:]:
        assert f"{name}:" in apply.__doc__, name
        assert name in section, name


def test_a_patched_model_runs_on():
    model, x = make(), torch.randn(2, 3, 48, 48)
    expected = model(x)
    for method, settings in (("tome", {"r": 4}), ("algm", {"layers": (1, 3), "threshold": -1.0})):
        assert not torch.equal(patch(model, method, **settings)(x), expected)
        assert torch.equal(unpatch(model)(x), expected)
