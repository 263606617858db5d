# SPDX-License-Identifier: MIT
"""torch.compile, torch.export and ONNX of attention followed by keep_topk, in one function."""

import io

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import tokred_kernels as tk


def attend_and_prune(qkv, policy):
    """(B, N, 3 H d): attention with a policy, EViT's reduction by importance, attention with the sizes that came."""
    q, k, v = qkv.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind()
    out, worth = tk.token_attention(q, k, v, policy=policy, importance="class")
    token_map = tk.keep_topk(worth, 5, fuse=True, num_prefix=1)
    x = out.transpose(1, 2).flatten(2)
    y = tk.merge(x, token_map, reduce="sum", weight=torch.where(token_map.dest < 6, 1.0, worth))
    size = tk.merge(torch.ones_like(x[..., :1]), token_map, reduce="sum")
    heads = y.unflatten(2, (2, -1)).transpose(1, 2)
    last = tk.token_attention(heads.sin(), heads.cos(), heads, size=size, importance="mean")
    return y, *last, tk.token_attention(heads, heads, heads), token_map.dest


def assert_all_equal(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


class Pruner(torch.nn.Module):
    def forward(self, qkv, policy):
        return attend_and_prune(qkv, policy)


def pruner_inputs(tokens):
    return torch.randn(2, tokens, 24, requires_grad=True), torch.rand(2, tokens).requires_grad_()


@pytest.mark.parametrize("which", ["cpu", "reference"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_attention_and_pruning_whole(which, dynamic):
    with tk.use_backend(which):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(attend_and_prune, fullgraph=True, dynamic=dynamic, backend=counter)
        for tokens in (21, 30, 64) if dynamic else (21, 21):
            arguments = pruner_inputs(tokens)
            got, want = compiled(*arguments), attend_and_prune(*arguments)
            assert_all_equal(got, want)
            losses = (sum(part.square().sum() for part in parts[:4]) for parts in (got, want))
            assert_all_equal(*(torch.autograd.grad(loss, arguments) for loss in losses))
        assert counter.frame_count == 1


def attend_to_itself(z):
    out, worth = tk.token_attention(z, z, z, importance="mean")
    gathered, lse = tk.lookup_gather(z, z, z)
    return out, worth, gathered, tk.lookup_scatter(z, z, z, lse)


def test_compiles_attention_of_a_tensor_to_itself():
    torch._dynamo.reset()
    z = torch.randn(2, 2, 17, 8, requires_grad=True)
    compiled = torch.compile(attend_to_itself, fullgraph=True, backend="aot_eager")
    got, want = compiled(z), attend_to_itself(z)
    assert_all_equal(got, want)
    losses = (sum(part.square().sum() for part in parts) for parts in (got, want))
    assert_all_equal(*(torch.autograd.grad(loss, z) for loss in losses))


def test_compiles_attention_and_pruning_with_inductor():
    torch._dynamo.reset()
    arguments = pruner_inputs(17)
    got, want = torch.compile(attend_and_prune, fullgraph=True, dynamic=False)(*arguments), attend_and_prune(*arguments)
    assert_all_equal(got, want)
    losses = (sum(part.square().sum() for part in parts[:4]) for parts in (got, want))
    assert_all_equal(*(torch.autograd.grad(loss, arguments) for loss in losses))


@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_exports_attention_and_pruning(which):
    tokens = torch.export.Dim("tokens", min=16, max=4096)
    with tk.use_backend(which), torch.no_grad():
        program = torch.export.export(Pruner(), pruner_inputs(17), dynamic_shapes=({1: tokens}, {1: tokens}))
        for number in (17, 30):
            arguments = pruner_inputs(number)
            assert_all_equal(program.module()(*arguments), Pruner()(*arguments))


def test_attention_and_pruning_run_in_onnxruntime():
    onnxruntime = pytest.importorskip("onnxruntime")
    arguments = tuple(t.detach() for t in pruner_inputs(17))
    buffer = io.BytesIO()
    with tk.use_backend("reference"):
        torch.onnx.export(Pruner().eval(), arguments, dynamo=True, verbose=False).save(buffer)
        want = Pruner()(*arguments)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    got = session.run(None, dict(zip(names, (t.numpy() for t in arguments), strict=True)))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w.numpy(), rtol=1e-5, atol=1e-6)
