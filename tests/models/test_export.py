# SPDX-License-Identifier: MIT
"""Patched models, with as many merging whatever the image, through torch.compile, torch.export and ONNX."""

import pytest
import torch
from torch import nn

from tokred_kernels import unmerge, use_backend
from tokred_kernels.models.imports import import_timm
from tokred_kernels.models.state import TokenState
from tokred_kernels.patching import patch, unpatch

timm = import_timm()
VisionTransformer = timm.models.vision_transformer.VisionTransformer

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")

METHODS = {
    "tome": {"r": (3, -1)},
    "algm": {"layers": (0, 1, 2), "count": [2, 1, 3], "prop_attn": True},
    "evit": {"layers": (0, 2), "importance": "mean"},
    "dynamicvit": {"layers": (0, 1, 2)},
}


def make(method="tome", r=None, **more):
    model = VisionTransformer(**{**TINY, **more}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return patch(model, method, **(METHODS[method] if r is None else {"r": r}))


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size)


# aot_eager traces forward and backward as any compiler does, and spares the minutes of C++ that inductor takes.
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("backend", "pool"), [("reference", "token"), ("auto", "avg")])
def test_compiles_whole_and_once(backend, pool, method):
    model = make(method, global_pool=pool)
    with use_backend(backend):
        x = images()
        expected = model(x)
        expected.square().sum().backward()
        learning = [p for p in model.parameters() if p.grad is not None]  # a predictor has none when evaluating
        gradients, expected_map = [p.grad.clone() for p in learning], model.token_map
        model.zero_grad()

        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
        y = compiled(x)
        y.square().sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        for parameter, gradient in zip(learning, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.token_map.dest, expected_map.dest)

        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(3):
                x = images()
                compiled(x).sum().backward()
                compiled_map, sizes = model.token_map, model.token_sizes
                model(x)
                assert torch.equal(compiled_map.dest, model.token_map.dest)  # of the last call, not of the first
                assert torch.equal(sizes, model.token_sizes)


@pytest.mark.parametrize("method", METHODS)
def test_compiles_block_by_block(method):
    model, x = make(method), images()
    expected = model(x)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    # The number of tokens is another in each block, and from the second one on the compiler leaves it open.
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiles_with_inductor(method):
    model, x = make(method), images()
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_compiles_once_for_all_batches_and_token_counts(backend):
    model = make(r=3, depth=1)
    block = model.blocks[0]
    with use_backend(backend), torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        model(images())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for batch in (2, 3, 5):
            x = images(batch)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
        # timm itself is compiled anew for each image size, so other token counts go to a block alone.
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
        for batch, tokens in ((2, 65), (3, 48), (4, 100)):
            x, size = torch.randn(batch, tokens, 32), torch.rand(batch, tokens, 1) + 1
            y, state, token_map = compiled(x, TokenState(size))
            expected = block(x, TokenState(size))
            torch.testing.assert_close(y, expected[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(state.size, expected[1].size)
            assert torch.equal(token_map.dest, expected[2].dest)


@pytest.mark.parametrize("count", ["batch", "image"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_counts_that_depend_on_images_compile_in_parts(backend, count):
    model, x = make(global_pool="avg"), images()
    patch(unpatch(model), "algm", layers=(0, 2), threshold=0.1, count=count)
    with use_backend(backend), torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        for x in (images(), images(3)):
            expected = model(x)
            torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_torch_export(method, backend, strict):
    model = make(method, global_pool="avg", class_token=False, reg_tokens=2)
    with use_backend(backend), torch.no_grad():
        program = torch.export.export(model, (images(),), strict=strict)
        for _ in range(2):
            x = images()
            torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["avg", "avgmax", "map"])
def test_an_exported_model_can_be_moved_to_another_dtype(pool):
    model, x = make(global_pool=pool, class_token=pool != "map"), images()
    with torch.no_grad():
        expected = model(x)
        moved = torch.export.export(model, (x,)).module().to(torch.bfloat16)
        actual = moved(x.bfloat16())
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


class Grid(nn.Module):
    """Tokens brought back to their places, as a dense head takes them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return unmerge(self.model.forward_features(x), self.model.token_map)


@pytest.mark.parametrize("method", METHODS)
def test_the_map_is_there_inside_an_exported_model(method):
    grid, x = Grid(make(method)), images()
    with torch.no_grad():
        expected = grid(x)
        program = torch.export.export(grid, (images(),))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-5, atol=1e-5)
        grid.model(x)
        assert not torch.equal(grid.model.token_map.dest, torch.zeros(2, 17))  # a real one again


class Head(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).softmax(-1)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_exporting_leaves_no_record_of_unreal_tensors(strict):
    head = Head(make())
    torch.export.export(head, (images(),), strict=strict)
    with pytest.raises(AttributeError, match="before its first forward"):
        _ = head.model.token_map


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, {"class_token": False, "global_pool": "avg"}], ids=["class token", "mean"])
def test_onnx_runtime_gives_the_same(settings, method, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = make(method, **settings), tmp_path / "model.onnx"
    with use_backend("reference"), torch.no_grad():
        torch.onnx.export(model, (images(),), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path)
        name = session.get_inputs()[0].name
        for x in (images(), torch.ones(2, 3, 32, 32)):  # the second: nothing but ties
            expected = model(x)
            (got,) = session.run(None, {name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)


def test_the_exported_order_is_the_eager_one():
    from tokred_kernels.backends.reference.rank_candidates import ranks

    class Order(nn.Module):
        def forward(self, scores):
            return ranks(scores)

    scores = torch.randint(-3, 3, (4, 33)).float()
    scores[1, ::3] = -torch.inf
    program = torch.export.export(Order(), (scores,))
    assert torch.equal(program.module()(scores), ranks(scores))
    assert "sort" not in str(program.graph)
