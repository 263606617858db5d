# SPDX-License-Identifier: MIT
"""Patched models in tools that look into a model: tracers, exporters, compilers, hooks, and callers of its parts."""

import inspect
import io

import hf_models
import pytest
import torch
from method_settings import METHODS
from torch import nn

from tokred_kernels import use_backend
from tokred_kernels.models.imports import import_timm
from tokred_kernels.patching import patch

timm = import_timm()
SIZES = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
TIES = torch.ones(2, 3, 48, 48)
FIXED = METHODS | {"algm": {"layers": (0, 2), "count": 3}}

pytestmark = [
    pytest.mark.usefixtures("one_thread", "fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:Constant fold"),
]


def make(method="tome", **more):
    model = timm.models.vision_transformer.VisionTransformer(**SIZES, **more).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return patch(model, method, **FIXED[method])


def images(batch=2):
    return torch.randn(batch, 3, 48, 48)


class Result(nn.Module):
    """A model of transformers as a function of one tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return hf_models.result(self.model(pixel_values=x))


def make_hf(name, **settings):
    return Result(patch(hf_models.make(name), "tome", **settings or {"r": 5})).eval()


# --- attributes of a model that has not run


@pytest.mark.parametrize("build", [make, lambda: hf_models.make("vit"), lambda: hf_models.make("vit, encoder")])
def test_attributes_of_the_last_forward_are_absent_before_it(build):
    model = build()
    if not hasattr(model, "tokred_patch"):
        patch(model, "tome", r=5)
    for name in ("token_map", "token_sizes"):
        assert not hasattr(model, name)
        assert getattr(model, name, None) is None
        assert name not in dict(inspect.getmembers(model))
        with pytest.raises(AttributeError, match=f"no {name} before its first forward; run it once"):
            getattr(model, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = model.nothing
    with torch.no_grad():
        model(images())
    assert model.token_map.num_out == model.token_sizes.shape[1] == 17


def test_maps_that_are_not_kept_are_absent():
    model = patch(make(), "tome", r=5, trace=False, replace=True)
    model(images())
    assert not hasattr(model, "token_map")
    assert hasattr(model, "token_sizes")
    with pytest.raises(AttributeError, match="patch it with trace=True"):
        _ = model.token_map


# --- torch.jit.trace and ONNX


def agrees(run, model, *more):
    with torch.no_grad():
        for x in (images(1), images(2), images(3), *more):
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("method", FIXED)
def test_a_traced_model_needs_nothing_of_ours(method, ran):
    model = make(method)
    if ran:
        model(images())
    traced, file = torch.jit.trace(model, images()), io.BytesIO()  # which compares graphs with and without gradients
    assert "tokred::" not in str(traced.inlined_graph)
    torch.jit.save(traced, file)
    agrees(torch.jit.load(io.BytesIO(file.getvalue())), model, TIES)
    x = images().requires_grad_()
    expected = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(traced(x).square().sum(), x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip, encoder", "dinov2", "clip, projection"])
def test_models_of_transformers_are_traced(name):
    model = make_hf(name)
    agrees(torch.jit.trace(model, images()), model)


def onnx_session(model, **settings):
    onnxruntime, file = pytest.importorskip("onnxruntime"), io.BytesIO()
    axes = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(model, (images(),), file, dynamo=False, **axes, **settings)
    session = onnxruntime.InferenceSession(file.getvalue())
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("settings", [{}, {"class_token": False, "global_pool": "avg"}], ids=["class token", "mean"])
@pytest.mark.parametrize("method", FIXED)
def test_onnx_files_of_the_older_exporter_take_any_batch(method, settings):
    if method in ("evit", "diffrate") and settings:
        pytest.skip("needs a class token")
    model = make(method, **settings)
    agrees(onnx_session(model), model, TIES)


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip, encoder"])
def test_onnx_files_of_models_of_transformers_take_any_batch(name):
    model = make_hf(name)
    agrees(onnx_session(model), model)


@pytest.mark.parametrize("count", ["batch", "image"])
@pytest.mark.parametrize("layers", [(0,), (0, 2)])
def test_counts_that_depend_on_the_images_are_not_fixed_in_silence(layers, count):
    model = timm.models.vision_transformer.VisionTransformer(**SIZES).eval()
    patch(model, "algm", layers=layers, threshold=0.2, count=count)
    for export in (torch.jit.trace, torch.export.export):
        with pytest.raises(NotImplementedError, match=rf'with count="{count}" .*; patch the model with count=<int>'):
            export(model, (images(),))
    assert model(images()).shape == (2, 5)


# --- torch.export


@pytest.mark.parametrize(("backend", "strict"), [("auto", False), ("auto", True), ("reference", False)])
@pytest.mark.parametrize("method", FIXED)
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_an_exported_model_takes_any_batch(method, backend, strict):
    model, batch = make(method), torch.export.Dim("batch")
    with use_backend(backend), torch.no_grad():
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},), strict=strict)
        agrees(program.module(), model)


@pytest.mark.parametrize("dim", ["auto", "named"])
@pytest.mark.parametrize("name", ["siglip, encoder", "siglip", "vit", "clip, classifier", "dinov3"])
def test_an_exported_model_of_transformers_takes_any_batch(name, dim):
    model, batch = make_hf(name), torch.export.Dim.AUTO if dim == "auto" else torch.export.Dim("batch")
    with torch.no_grad():
        agrees(torch.export.export(model, (images(),), dynamic_shapes=({0: batch},)).module(), model)


# --- what cannot work


@pytest.mark.parametrize("scriptable", [False, True])
def test_scripting_is_refused_in_one_sentence(scriptable):
    with timm.layers.set_scriptable(scriptable):
        models = [make(), make_hf("vit"), nn.Sequential(make()), make().blocks]
        for model in models:
            with pytest.raises(NotImplementedError, match=r"cannot compile a patched .*; use torch.jit.trace"):
                torch.jit.script(model)
        agrees(models[0], models[0])


EXTRACTORS = {
    "symbolic_trace": torch.fx.symbolic_trace,
    "timm": lambda model: timm.models._features_fx.create_feature_extractor(model, ["blocks.1"]),
}


@pytest.mark.parametrize("extract", EXTRACTORS.values(), ids=EXTRACTORS)
def test_fx_is_refused_in_one_sentence(extract):
    for model in (make(), nn.Sequential(make())):
        with pytest.raises(
            NotImplementedError, match=r"torch.fx cannot trace a patched model.*use torch.export.export"
        ):
            extract(model)


def test_fx_leaves_a_patched_model_whole_where_it_is_a_leaf():
    class Leaf(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return hasattr(module, "tokred_patch") or super().is_leaf_module(module, name)

    model = nn.Sequential(make())
    agrees(torch.fx.GraphModule(model, Leaf().trace(model)), model)


def test_blocks_called_by_others_name_what_to_call_instead():
    model, tokens = make(), torch.randn(2, 37, 48)

    def one_by_one(x):
        for block in model.blocks:
            x = block(x)
        return x

    for call in (model.blocks, model.blocks[0], one_by_one):
        with pytest.raises(RuntimeError, match=r"call model.forward_features"):
            call(tokens)
    with pytest.raises(RuntimeError, match=r"call tokred_kernels.unpatch"):
        patch(hf_models.make("vit, encoder"), "tome", r=5).layers[0](tokens)
