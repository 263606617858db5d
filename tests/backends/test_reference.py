# SPDX-License-Identifier: MIT
"""The reference on a GPU: sums in a fixed order, and products that ignore torch's TF32 settings.

Without a GPU its formulation for GPUs runs on CPU tensors, and the operators that it calls are recorded.
"""

import importlib

import pytest
import torch
from support import random_map, random_packed_map
from torch.utils._python_dispatch import TorchDispatchMode

import tokred_kernels as tk
from tokred_kernels import backends
from tokred_kernels.backends import reference
from tokred_kernels.backends.reference import segments
from tokred_kernels.partition import every_other

# Nondeterministic on CUDA for floating point (the documentation of torch.use_deterministic_algorithms).
NONDETERMINISTIC = {
    *("scatter_add", "index_add", "index_put", "_index_put_impl", "index_copy", "put"),
    *("cumsum", "histc", "bincount", "median", "kthvalue", "repeat_interleave", "embedding_dense_backward"),
}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot", "_scaled_dot_product_attention_math"}


class Recorder(TorchDispatchMode):
    """Records the names of all operators, and of those that break a promise."""

    def __init__(self):
        super().__init__()
        self.seen, self.nondeterministic, self.rounded = set(), [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        self.seen.add(name)
        if (name in NONDETERMINISTIC and result.is_floating_point()) or (
            name == "scatter_reduce" and args[4] != "amax"
        ):
            self.nondeterministic.append(name)
        if name == "scatter" and isinstance(args[3], torch.Tensor):  # ordered only if no two values meet
            index = args[2].sort(args[1]).values
            if (index.diff(dim=args[1]) == 0).any():
                self.nondeterministic.append(name)
        if name in PRODUCTS and args[-1].dtype != torch.float64:
            self.rounded.append(name)
        return result


@pytest.fixture
def as_on_gpu(monkeypatch):
    for module in (reference, segments):
        monkeypatch.setattr(module, "runs_on_gpu", lambda tensor: True)
    with tk.use_backend("reference"):
        yield


def tokens(*shape):
    return torch.randn(*shape).requires_grad_()


def attend(**settings):
    q, k, v = tokens(2, 2, 9, 4), tokens(2, 2, 9, 4), tokens(2, 2, 9, 4)
    terms = {"size": torch.rand(2, 9).add(0.5).requires_grad_(), "policy": torch.rand(2, 9).requires_grad_()}
    return (q, k, v, *terms.values()), tk.token_attention(q, k, v, **terms, **settings)


def look_up():
    q, k, v, values = tokens(1, 2, 3, 4), tokens(1, 2, 9, 4), tokens(1, 2, 9, 4), tokens(1, 2, 3, 4)
    out, lse = tk.lookup_gather(q, k, v)
    return (q, k, v, values), (out, tk.lookup_scatter(q, k, values, lse))


def merge(reduce, weighted=False, token_map=None):
    token_map = random_map(2, 9, 4, dropped=0.2) if token_map is None else token_map
    batch = token_map.batch
    x, weight = tokens(batch, 9, 3), torch.rand(batch, 9).add(0.5).requires_grad_()
    return (x, weight), tk.merge(x, token_map, reduce=reduce, weight=weight if weighted else None)


def unmerge():
    y = tokens(2, 4, 3)
    return (y,), tk.unmerge(y, random_map(2, 9, 4, dropped=0.2))


def select():
    """Every op that makes maps. None has a gradient."""
    x = torch.randn(2, 17, 4)
    dest, kept = tk.bipartite_match(x, 3).dest, tk.keep_topk(torch.rand(2, 14), 5, fuse=True, num_prefix=1).dest
    partner, rank = torch.zeros(2, 9, dtype=torch.int32), torch.arange(9, dtype=torch.int32).expand(2, -1)
    # Selectors may leave integer maps to another backend, so these are called by name.
    for op, arguments in {
        "compose": (dest, kept),
        "to_csr": (dest, 14),
        "build_match_map": (partner, rank, every_other(17, 3, None, False, False), 17),
    }.items():
        backends.implementation("reference", op)(*arguments)
    tk.importance_match(x, 9)
    tk.adaptive_bipartite_match(x, layer_index=2)
    tk.window_match(x, 0.1, window=(2, 2), grid=(4, 4), count="image", num_prefix=1)
    tk.window_match(x, 0.1, window=(2, 2), grid=(4, 4), num_prefix=1)
    return (), ()


CALLS = {
    **{f"merge_{reduce}": lambda reduce=reduce: merge(reduce) for reduce in ("sum", "mean", "amax")},
    "merge_weighted": lambda: merge("mean", weighted=True),
    "merge_packed": lambda: merge("mean", token_map=random_packed_map(9, dropped=0.2)),
    "unmerge": unmerge,
    **{f"attention_{name}": lambda name=name: attend(importance=name) for name in ("class", "mean")},
    "lookup": look_up,
    "selectors": select,
}


@pytest.mark.parametrize("name", CALLS)
def test_no_operator_is_nondeterministic_or_follows_tf32_settings(name, as_on_gpu):
    with Recorder() as recorder:
        leaves, outputs = CALLS[name]()
        if leaves:
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            value = sum(output.double().sin().sum() for output in outputs)
            first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
            second = sum(gradient.double().sin().sum() for gradient in first if gradient is not None)
            torch.autograd.grad(second, leaves, allow_unused=True)
    assert recorder.nondeterministic == []
    assert recorder.rounded == []
    expected = "_embedding_bag_forward_only" if "merge" in name else "bmm"
    assert expected in recorder.seen


def test_every_op_is_recorded(as_on_gpu, monkeypatch):
    called = set()

    def spy(op, function):
        return lambda *args, **kwargs: called.add(op) or function(*args, **kwargs)

    ops = {op for op in backends.OPS if not op.endswith("_backward")}
    for op in ops:
        module = importlib.import_module(f"tokred_kernels.backends.reference.{op}")
        monkeypatch.setattr(module, op, spy(op, getattr(module, op)))
    backends.implementation.cache_clear()
    for call in CALLS.values():
        call()
    backends.implementation.cache_clear()
    assert called == ops


@pytest.mark.parametrize("reduce", ["sum", "mean", "amax"])
@pytest.mark.parametrize("tokens,slots", [(1, 1), (2, 1), (3, 2), (5, 9), (17, 1), (197, 181), (0, 3), (4, 0)])
@pytest.mark.parametrize("batch,channels", [(2, 5), (0, 5), (2, 0)])
def test_sorted_sums_equal_scatter(reduce, tokens, slots, batch, channels, as_on_gpu, monkeypatch):
    token_map = random_map(batch, tokens, slots, dropped=0.2 if slots else 1.0)
    x = torch.randn(batch, tokens, channels)
    if x.numel() and tokens > 1:
        x[0, 0, 0], x[1, 1, 1] = torch.nan, torch.inf
    x.requires_grad_()

    def run():
        y = tk.merge(x, token_map, reduce=reduce)
        back = tk.unmerge(y, token_map)
        return y, back, *torch.autograd.grad(back.nan_to_num().sin().sum(), x)

    found = run()
    monkeypatch.setattr(segments, "runs_on_gpu", lambda tensor: False)
    for got, want in zip(found, run(), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("reduce", ["sum", "mean", "amax"])
def test_sorted_sums_differentiate_twice(reduce, as_on_gpu):
    token_map = random_map(2, 7, 3, dropped=0.2)
    x = torch.randn(2, 7, 2, dtype=torch.float64, requires_grad=True)
    weight = None if reduce == "amax" else torch.rand(2, 7, dtype=torch.float64).add(0.5).requires_grad_()

    def call(x, weight):
        return tk.unmerge(tk.merge(x, token_map, reduce=reduce, weight=weight), token_map)

    assert torch.autograd.gradcheck(call, (x, weight))
    assert torch.autograd.gradgradcheck(call, (x, weight))


@pytest.mark.parametrize("reduce", ["mean", "amax"])
def test_sorted_sums_compile_into_one_graph(reduce, as_on_gpu, fresh_dynamo):
    token_map, x = random_map(2, 9, 4, dropped=0.2), tokens(2, 9, 3)

    def call(x):
        return tk.unmerge(tk.merge(x, token_map, reduce=reduce), token_map)

    for compiled, eager in zip(*(
        (y, *torch.autograd.grad(y.sin().sum(), x))
        for y in (torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
    ), strict=True):  # fmt: skip
        assert torch.equal(compiled, eager)


def test_sorted_sums_take_batches_of_gradients_and_vmap(as_on_gpu):
    x, token_map = tokens(2, 9, 3), random_map(2, 9, 4, dropped=0.2)
    for y in (tk.merge(x, token_map), tk.unmerge(x[:, :4], token_map)):
        directions = torch.randn(3, *y.shape)
        (batched,) = torch.autograd.grad(y, x, directions, is_grads_batched=True, retain_graph=True)
        for got, direction in zip(batched, directions, strict=True):
            torch.testing.assert_close(got, *torch.autograd.grad(y, x, direction, retain_graph=True))
    batches = torch.randn(3, 2, 9, 3)
    found = torch.func.vmap(lambda x: tk.merge(x, token_map))(batches)
    torch.testing.assert_close(found, torch.stack([tk.merge(x, token_map) for x in batches]))


def test_an_exported_graph_keeps_float32_products(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    a, b = torch.randn(2, 3), torch.randn(3, 4)
    assert reference.runs_on_gpu(a)
    monkeypatch.setattr(reference, "is_exporting", lambda: True)
    assert not reference.runs_on_gpu(a) and torch.equal(reference.product(a, b), a @ b)


@pytest.mark.gpu
def test_on_a_gpu_results_repeat_and_ignore_tf32():
    token_map = random_map(8, 577, 3).to("cuda")
    x, q = torch.randn(8, 577, 64, device="cuda"), torch.randn(2, 2, 100, 64, device="cuda")
    x.requires_grad_()
    q.requires_grad_()

    def run():
        merged = tk.merge(x, token_map)
        out, worth = tk.token_attention(q, q, q, importance="mean")
        gradients = torch.autograd.grad(merged.sin().sum() + out.sin().sum() + worth.sum(), (x, q))
        return merged, out, worth, *gradients, tk.importance_match(x, 200)[1]

    before = torch.get_float32_matmul_precision()
    try:
        with tk.use_backend("reference"):
            results = []
            for precision in ("highest", "high", "high"):
                torch.set_float32_matmul_precision(precision)
                results.append(run())
    finally:
        torch.set_float32_matmul_precision(before)
    for again in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(again, results[0], strict=True))
