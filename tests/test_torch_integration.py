# SPDX-License-Identifier: MIT
"""torch.library.opcheck, torch.compile, torch.export, ONNX, autocast and vmap."""

import io

import numpy as np
import pytest
import torch
from support import random_map
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import tokred_kernels as tk
from tokred_kernels import torch_state
from tokred_kernels.ops.registry import SPECS

OPS = torch.ops.tokred
SAMPLES = 132


def samples():
    """Calls of each registered op: contiguous and permuted, odd N, empty."""
    for batch, tokens, channels in ((2, 17, 5), (1, 1, 1), (0, 4, 3), (2, 6, 0)):
        x = torch.randn(batch, tokens, channels)
        token_map = random_map(batch, tokens, 3, dropped=0.2)
        views, dest = token_map.views(), token_map.dest
        permuted = torch.randn(channels, batch, tokens).permute(1, 2, 0)
        weight = torch.rand(batch, tokens) + 0.5
        arithmetic = (None, None, 0, 2, tokens - tokens // 2, tokens // 2, 0, 0, False, min(1, tokens // 2), "cpu")
        yield OPS.bipartite_match.default, (x, *arithmetic)
        yield OPS.bipartite_merge.default, (x, x, None, *arithmetic[2:])
        yield OPS.bipartite_match.default, (torch.randn(batch, tokens, 2, 4).transpose(1, 2), *arithmetic)
        for values in (x, permuted):
            yield OPS.merge.default, (values, None, *views, "mean", False, "cpu")
            yield OPS.merge.default, (values, weight, *views, "sum", True, "cpu")
        y, total = OPS.merge.default(x, weight, *views, "mean", True, "cpu")
        yield OPS.unmerge.default, (y, dest, "cpu")
        common = (dest, *views)
        yield (
            OPS.merge_backward.default,
            (y, total, x, y, weight, total, *common, "mean", True, True, "cpu"),
        )
        yield OPS.merge_backward.default, (y, None, x, y, None, None, *common, "amax", True, False, "cpu")
        yield OPS.to_csr.default, (dest, 3, "cpu")
        yield OPS.compose.default, (dest, random_map(batch, 3, 2).dest, "cpu")
        yield from selector_samples(x, arithmetic[2:-1])
        yield from attention_samples(batch, tokens, channels)
        yield from lookup_samples(batch, tokens, channels)


def selector_samples(x, numbers):
    """Calls of the ops that selectors are made of: rectangular and packed."""
    batch, tokens, channels = x.shape
    lengths = tuple(max(tokens - b, 0) for b in range(batch))
    packed = tk.Packing.of(lengths, x.device)
    longest = (None, None, *numbers)
    score, partner, rank = OPS.rank_candidates.default(x, *longest, None, "cpu")
    yield OPS.rank_candidates.default, (x, *longest, None, "cpu")
    yield OPS.rank_candidates.default, (torch.randn(packed.rows, channels), *longest, packed.cu_seqlens, "cpu")
    yield OPS.build_match_map.default, (partner, rank, *longest, tokens, None, None, None, tokens - numbers[-1], "cpu")
    counts = torch.full((batch,), min(1, tokens // 2), dtype=torch.int32)
    after = tk.Packing.of(tuple(tokens - n for n in counts.tolist()), x.device)
    packing = counts, None, after.cu_seqlens, after.rows
    yield OPS.build_match_map.default, (partner, rank, *longest, tokens, *packing, "cpu")
    yield OPS.count_above_threshold.default, (score, 0.1, 0.0, False, "cpu")
    windows = (0, 1, tokens, 1, max(tokens // 3, 1))
    number = 0 if batch == 0 else tokens // windows[-1]
    yield OPS.window_similarity.default, (x, *windows, 0.1, "cpu")
    likeness = torch.randn(batch, tokens // windows[-1])
    gone = windows[-1] - 1
    yield OPS.window_map.default, (likeness, *windows, 1, None, None, tokens - gone, "cpu")
    counts = torch.full((batch,), number, dtype=torch.int32)
    after = tk.Packing.of((tokens - number * gone,) * batch, x.device)
    yield OPS.window_map.default, (likeness, *windows, 0, counts, after.cu_seqlens, after.rows, "cpu")


def attention_samples(batch, tokens, channels):
    """Attention with and without terms, rectangular and packed, and what keeps the highest of its scores."""
    scores, kept = torch.randn(tokens, batch).t(), (tokens - 1) // 2
    yield OPS.keep_topk.default, (scores, kept, 1, False, "cpu")
    yield OPS.keep_topk.default, (scores.contiguous(), kept, 0, True, "cpu")
    q, k, v = torch.randn(batch, tokens, 3, 2, channels).permute(2, 0, 3, 1, 4).unbind()
    bias, policy = torch.randn(batch, tokens), torch.rand(batch, tokens)
    starts = tk.Packing.of((tokens,) * batch, q.device).cu_seqlens
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    for tensors, how in (
        ((q, k, v, None, policy, None), (0, 0.5, "")),
        ((q, k, v, bias, policy, None), (0, 0.5, "mean")),
        ((*rows, bias.flatten(), None, starts), (tokens, 0.5, "class")),
    ):
        yield OPS.token_attention.default, (*tensors, *how, "cpu")
        out, row_max, row_sum, worth = OPS.token_attention.default(*tensors, *how, "cpu")
        grads = torch.randn_like(out), torch.randn_like(worth) if how[2] else None
        wanted = tensors[3] is not None, tensors[4] is not None
        yield (
            OPS.token_attention_backward.default,
            (*grads, *tensors, out, row_max, row_sum, *how, *wanted, "cpu"),
        )


def lookup_samples(batch, tokens, channels):
    """Lookup attention of fewer tokens, both ways."""
    few = (tokens + 1) // 2
    q, values = (torch.randn(batch, few, 2, channels).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(batch, tokens, 2, channels).transpose(1, 2) for _ in range(2))
    yield OPS.lookup_gather.default, (q, k, v, 0.5, "cpu")
    out, lse = OPS.lookup_gather.default(q, k, v, 0.5, "cpu")
    for grad_lse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), grad_lse, q, k, v, out, lse, 0.5, "cpu")
        yield OPS.lookup_gather_backward.default, arguments
    yield OPS.lookup_scatter.default, (q, k, values, lse, 0.5, "cpu")
    grad_out = torch.randn(batch, tokens, 2, channels)
    yield OPS.lookup_scatter_backward.default, (grad_out, q, k, values, lse, 0.5, "cpu")


@pytest.mark.parametrize("number", range(SAMPLES))
def test_opcheck(number):
    op, arguments = list(samples())[number]
    torch.library.opcheck(op, arguments)


def test_every_op_is_sampled():
    names = {op.name() for op, _ in samples()}
    assert names == {f"tokred::{name}" for name in SPECS if SPECS[name].is_registered}
    assert len(list(samples())) == SAMPLES


def reduce_twice(x, size, keys):
    first = tk.bipartite_merge(x, 4, metric=keys, size=size, class_token=True)
    second = tk.bipartite_merge(first.x.sin(), 3, size=first.size, num_prefix=2)
    token_map = first.token_map.then(second.token_map)
    return tk.unmerge(second.x, token_map), second.size, tk.merge(x, token_map, reduce="amax"), token_map


def inputs(tokens):
    x = torch.randn(2, tokens, 8, requires_grad=True)
    size = (torch.rand(2, tokens, 1) + 0.5).requires_grad_()
    return x, size, torch.randn(2, 3, tokens, 4)


def loss(outputs):
    back, size, highest, _ = outputs
    return back.pow(2).sum() + size.log().sum() + highest.sum()


@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_compiles_whole_forward_and_backward(which):
    with tk.use_backend(which):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(reduce_twice, fullgraph=True, dynamic=False, backend=counter)
        for _ in range(3):  # a fixed schedule: one compilation serves every call
            arguments = inputs(21)
            got, want = compiled(*arguments), reduce_twice(*arguments)
            assert torch.equal(got[3].dest, want[3].dest)
            for g, w in zip(got[:3], want[:3], strict=True):
                torch.testing.assert_close(g, w)
            grads = (torch.autograd.grad(loss(o), arguments[:2]) for o in (got, want))
            for g, w in zip(*grads, strict=True):
                torch.testing.assert_close(g, w)
        assert counter.frame_count == 1


def test_compiles_with_inductor():
    torch._dynamo.reset()
    arguments = inputs(17)
    compiled = torch.compile(reduce_twice, fullgraph=True, dynamic=False)
    got, want = compiled(*arguments), reduce_twice(*arguments)
    grads = (torch.autograd.grad(loss(o), arguments[:2]) for o in (got, want))
    for g, w in zip(*grads, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_compiles_once_for_any_number_of_tokens(which):
    with tk.use_backend(which):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(reduce_twice, fullgraph=True, dynamic=True, backend=counter)
        for tokens in (21, 22, 40, 33, 197):
            arguments = inputs(tokens)
            got = compiled(*arguments)
            torch.testing.assert_close(got[0], reduce_twice(*arguments)[0])
            loss(got).backward()
        assert counter.frame_count == 1


def select_by_all(images):
    """Every selector that needs no count from the host, on (B, H, W, C)."""
    grid = tuple(images.shape[1:3])
    x = images.flatten(1, 2)
    local = tk.window_match(x, 0.3, grid=grid, num_prefix=0, count=4)
    y, size = tk.merge_wavg(x, local)
    alike = tk.adaptive_bipartite_match(y, class_token=True, count=3)
    y, size = tk.merge_wavg(y, alike, size)
    important, similarity = tk.importance_match(y, 12, class_token=True)
    y, size = tk.merge_wavg(y, important, size)
    sparse = tk.grid_bipartite_match(x, 5, grid=grid)
    maps = local, alike, important, sparse
    return y, size, similarity, tk.merge(x, sparse), *(token_map.dest for token_map in maps)


def assert_all_equal(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_compiles_the_selectors_whole(which):
    with tk.use_backend(which):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(select_by_all, fullgraph=True, dynamic=False, backend=counter)
        for _ in range(2):
            images = torch.randn(2, 6, 7, 8)
            assert_all_equal(compiled(images), select_by_all(images))
        assert counter.frame_count == 1


def test_compiles_the_selectors_once_for_any_grid():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(select_by_all, fullgraph=True, dynamic=True, backend=counter)
    for height, width in ((6, 8), (5, 9), (9, 7), (16, 16)):
        images = torch.randn(2, height, width, 3)
        assert_all_equal(compiled(images), select_by_all(images))
    assert counter.frame_count == 1


class Selectors(torch.nn.Module):
    def forward(self, images):
        return select_by_all(images)


@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_exports_the_selectors(which):
    with tk.use_backend(which):
        module = torch.export.export(Selectors(), (torch.randn(2, 6, 8, 3),)).module()
        images = torch.randn(2, 6, 8, 3)
        assert_all_equal(module(images), Selectors()(images))


class Reducer(torch.nn.Module):
    def forward(self, x, keys):
        out = tk.bipartite_merge(x, 4, metric=keys, class_token=True)
        return out.x, out.size, tk.unmerge(out.x, out.token_map), tk.merge(x, out.token_map, reduce="amax")


@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_exports(which):
    x, keys = torch.randn(2, 17, 8), torch.randn(2, 3, 17, 4)
    tokens = torch.export.Dim("tokens", min=16, max=4096)
    with tk.use_backend(which):
        program = torch.export.export(Reducer(), (x, keys), dynamic_shapes=({1: tokens}, {2: tokens}))
        for number in (17, 30):
            x, keys = torch.randn(2, number, 8), torch.randn(2, 3, number, 4)
            for got, want in zip(program.module()(x, keys), Reducer()(x, keys), strict=True):
                torch.testing.assert_close(got, want)


def test_exports_a_map():
    class Match(torch.nn.Module):
        def forward(self, metric):
            return tk.bipartite_match(metric, 3)

    metric = torch.randn(2, 17, 8)
    token_map = torch.export.export(Match(), (metric,)).module()(metric)
    assert isinstance(token_map, tk.TokenMap)
    assert torch.equal(token_map.dest, tk.bipartite_match(metric, 3).dest)


def test_runs_in_onnxruntime():
    onnxruntime = pytest.importorskip("onnxruntime")
    x, keys = torch.randn(2, 17, 8), torch.randn(2, 3, 17, 4)
    keys[0, :, 5] = keys[0, :, 3]  # a tie
    buffer = io.BytesIO()
    with tk.use_backend("reference"):
        torch.onnx.export(Reducer(), (x, keys), dynamo=True, verbose=False).save(buffer)
        want = Reducer()(x, keys)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    got = session.run(None, dict(zip(names, (x.numpy(), keys.numpy()), strict=True)))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w.numpy(), rtol=1e-5, atol=1e-6)


def test_selectors_run_in_onnxruntime():
    onnxruntime = pytest.importorskip("onnxruntime")
    images = torch.randn(2, 6, 7, 3)
    images[:, 2:4] = images[:, :2]  # windows that tie
    buffer = io.BytesIO()
    with tk.use_backend("reference"):
        torch.onnx.export(Selectors().eval(), (images,), dynamo=True, verbose=False).save(buffer)
        want = Selectors()(images)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w.numpy(), rtol=1e-5, atol=1e-6)


class Listener(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen.add(str(function))
        return function(*arguments, **(keywords or {}))


def test_modes_see_every_op():
    x = torch.randn(2, 9, 4, requires_grad=True)
    token_map = tk.bipartite_match(x, 3)
    with Listener() as listener:
        out = tk.bipartite_merge(x.detach(), 3)
        tk.unmerge(tk.merge(x, token_map), token_map.then(out.token_map.identity(2, 6))).sum().backward()
    ours = {name for name in listener.seen if name.startswith("tokred")}
    expected = ("bipartite_merge", "merge", "merge_backward", "unmerge", "compose", "to_csr")
    assert ours == {f"tokred.{name}.default" for name in expected}


def test_the_dispatcher_and_the_direct_way_give_the_same(monkeypatch):
    x, size, keys = inputs(21)
    direct = reduce_twice(x, size, keys)
    monkeypatch.setattr(torch_state, "_CAN_SKIP", False)
    dispatched = reduce_twice(x, size, keys)
    for got, want in zip(direct[:3], dispatched[:3], strict=True):
        assert torch.equal(got, want)


def test_works_under_autocast():
    x, size = torch.randn(2, 17, 8, requires_grad=True), torch.ones(2, 17, 1)
    with torch.autocast("cpu", torch.bfloat16):
        keys = torch.nn.functional.linear(x, torch.randn(4, 8))
        assert keys.dtype == torch.bfloat16
        out = tk.bipartite_merge(x, 4, metric=keys, size=size, class_token=True)
    assert out.x.dtype == torch.float32
    assert out.size.dtype == torch.float32
    out.x.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    "call",
    [
        lambda x, _: tk.merge(x[:, 0], tk.bipartite_match(x[:, 1], 3)),
        lambda x, _: tk.unmerge(x[:, 0, :6], tk.bipartite_match(x[:, 1], 3)),
        lambda x, _: tk.token_attention(x, x, x, importance="mean")[0],
        lambda x, _: tk.lookup_gather(x[:, :, :3], x, x)[0],
        lambda x, lse: tk.lookup_scatter(x[:, :, :3], x, x[:, :, :3], lse),
    ],
    ids=["merge", "unmerge", "token_attention", "lookup_gather", "lookup_scatter"],
)
def test_torch_func_grad_names_the_reference_or_runs_on_it(call):
    x, lse = torch.randn(2, 2, 9, 4), torch.randn(2, 2, 3)
    gradient = torch.func.grad(lambda x: call(x, lse).square().sum())
    with tk.use_backend("reference"):
        actual = gradient(x)
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(actual, torch.autograd.grad(call(leaf, lse).square().sum(), leaf)[0])
    with pytest.raises(NotImplementedError, match=r'torch.func cannot.*use_backend\("reference"\)'):
        gradient(x)


def test_vmap_is_refused_in_words():
    token_map = random_map(2, 9, 4)
    with pytest.raises(NotImplementedError, match=r"merge has no torch.func.vmap rule"):
        torch.func.vmap(lambda x: tk.merge(x, token_map))(torch.randn(3, 2, 9, 4))


def test_forward_mode_derivatives_are_refused_not_zero():
    x, token_map = torch.randn(2, 9, 4), random_map(2, 9, 4)
    q = torch.randn(1, 2, 5, 8)
    calls = {
        "merge": (lambda x: tk.merge(x, token_map), x),
        "unmerge": (lambda x: tk.unmerge(x[:, :4], token_map), x),
        "merge_wavg": (lambda x: tk.merge_wavg(x, token_map)[0], x),
        "bipartite_merge": (lambda x: tk.bipartite_merge(x, 2).x, x),
        "token_attention": (lambda q: tk.token_attention(q, q, q, importance="mean")[0], q),
        "lookup_gather": (lambda q: tk.lookup_gather(q, q, q)[0], q),
        "lookup_scatter": (lambda q: tk.lookup_scatter(q, q, q, q[..., 0].detach()), q),
    }
    for call, primal in calls.values():
        with pytest.raises(RuntimeError, match="use_backend"):
            torch.func.jvp(call, (primal,), (torch.ones_like(primal),))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(primal, torch.ones_like(primal))
            with pytest.raises(NotImplementedError, match="jvp"):
                call(dual)
            assert torch.equal(call(primal.clone()), call(primal))  # what has no tangent is served


@pytest.mark.gpu
def test_replays_in_a_cuda_graph():
    with tk.use_backend("cuda"):
        x, keys = torch.randn(4, 197, 384, device="cuda"), torch.randn(4, 6, 197, 64, device="cuda")
        tk.bipartite_merge(x, 16, metric=keys, class_token=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = tk.bipartite_merge(x, 16, metric=keys, class_token=True)
        x.normal_()
        keys.normal_()
        graph.replay()
        again = tk.bipartite_merge(x, 16, metric=keys, class_token=True)
        assert torch.equal(out.x, again.x)
        assert torch.equal(out.token_map.dest, again.token_map.dest)


@pytest.mark.gpu
def test_selectors_replay_in_a_cuda_graph():
    with tk.use_backend("cuda"):
        images = torch.randn(4, 14, 15, 64, device="cuda")
        select_by_all(images)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = select_by_all(images)
        images.normal_()
        graph.replay()
        for got, want in zip(out, select_by_all(images), strict=True):
            assert torch.equal(got, want)


def test_gradients_in_batches_are_those_one_by_one():
    x = torch.randn(2, 20, 8, requires_grad=True)
    q, size = torch.randn(2, 2, 20, 8, requires_grad=True), torch.rand(2, 20).add(0.5).requires_grad_()
    token_map = tk.bipartite_match(x, 5)
    merged, sizes = tk.merge_wavg(x, token_map, size)
    out, worth = tk.token_attention(q, q, q, size=size, importance="mean")
    bare = tk.unmerge(merged, token_map)
    for value, leaves in ((merged, (x, size)), (bare, (x,)), (out, (q, size)), (worth, (q, size)), (sizes, (size,))):
        directions = torch.randn(3, *value.shape)
        kept = {"retain_graph": True, "allow_unused": False}
        batched = torch.autograd.grad(value, leaves, directions, is_grads_batched=True, **kept)
        one_by_one = [torch.autograd.grad(value, leaves, direction, **kept) for direction in directions]
        for got, want in zip(batched, zip(*one_by_one, strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(want))
