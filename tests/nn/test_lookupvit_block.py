# SPDX-License-Identifier: MIT
"""LookupViT's block against its algorithms written out, with the weights A in memory, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tokred_kernels as tk
from tokred_kernels.models.imports import import_timm
from tokred_kernels.nn.lookupvit_block import DropPath, LookupViTBlock

timm = import_timm()

DIM, HEADS = 24, 3
BACKENDS = pytest.mark.parametrize("backend", ["reference", "auto"])
SETTINGS = {
    "plain": {},
    "output projection": {"scatter_proj": True},
    "layer scale": {"init_values": 0.3, "scatter_proj": True},
    "no bias, other widths": {"qkv_bias": False, "mlp_ratio": 1.5, "lookup_ratio": 4},
}

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


def make(**settings):
    block = LookupViTBlock(DIM, HEADS, **settings)
    for parameter in block.parameters():  # initial biases and norms are 0 and 1, and would test nothing
        nn.init.normal_(parameter, std=0.3)
    return block.double()


def tokens(compressed=5, lookup=11, batch=2):
    return [torch.randn(batch, n, DIM).double().requires_grad_() for n in (compressed, lookup)]


def written_out(block, z_p, z_l):
    """Algorithms 1 to 3, with one A for both ways."""
    parameters = dict(block.named_parameters())

    def norm(x, name):
        return F.layer_norm(x, (DIM,), parameters[f"{name}.weight"], parameters[f"{name}.bias"], 1e-6)

    def linear(x, name, rows=slice(None)):
        bias = parameters.get(f"{name}.bias")
        return x @ parameters[f"{name}.weight"][rows].T + (0 if bias is None else bias[rows])

    def branch(x, name):
        return x * parameters.get(f"{name}.gamma", 1)

    def heads(x):
        return x.reshape(len(x), -1, HEADS, DIM // HEADS).permute(0, 2, 1, 3)

    def join(x):
        return x.permute(0, 2, 1, 3).reshape(len(x), -1, DIM)

    def mlp(x, name):
        return linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2")

    def weights(q, k):
        return (q @ k.transpose(-2, -1) / (DIM // HEADS) ** 0.5).softmax(-1)

    first, second, third = (slice(i * DIM, (i + 1) * DIM) for i in range(3))
    asked, offered = norm(z_p, "gather.norm_p"), norm(z_l, "gather.norm_l")
    shared = weights(heads(linear(asked, "gather.q")), heads(linear(offered, "gather.kv", first)))
    gathered = join(shared @ heads(linear(offered, "gather.kv", second)))
    z_p = z_p + branch(linear(gathered, "gather.proj"), "ls_gather")
    x = norm(z_p, "norm1")
    q, k, v = (heads(linear(x, "attn.qkv", rows)) for rows in (first, second, third))
    z_p = z_p + branch(linear(join(weights(q, k) @ v), "attn.proj"), "ls1")
    z_p = z_p + branch(mlp(norm(z_p, "norm2"), "mlp"), "ls2")
    scattered = join(shared.transpose(-2, -1) @ heads(linear(norm(z_p, "scatter.norm"), "scatter.v")))
    if "scatter.proj.weight" in parameters:
        scattered = linear(scattered, "scatter.proj")
    z_l = z_l + branch(scattered, "ls_scatter")
    return z_p, z_l + branch(mlp(norm(z_l, "norm_lookup"), "mlp_lookup"), "ls_lookup")


def assert_same(block, z_p, z_l):
    """Outputs, and the gradients of every parameter and of both inputs."""
    found, expected = block(z_p, z_l), written_out(block, z_p, z_l)
    targets = [torch.randn_like(out) for out in found]
    leaves = [*block.parameters(), z_p, z_l]
    gradients = [
        torch.autograd.grad(sum((a * b).sum() for a, b in zip(outs, targets, strict=True)), leaves)
        for outs in (found, expected)
    ]
    for ours, theirs in zip((*found, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
        assert theirs.abs().max() > 0 or theirs.numel() == 0


# --- the numbers


@BACKENDS
@pytest.mark.parametrize("name", SETTINGS)
def test_the_algorithms_written_out_and_all_gradients(name, backend):
    with tk.use_backend(backend):
        assert_same(make(**SETTINGS[name]), *tokens())


@pytest.mark.parametrize(("compressed", "lookup"), [(1, 2), (1, 40), (7, 7), (3, 100)])
def test_every_number_of_tokens(compressed, lookup):
    assert_same(make(), *tokens(compressed, lookup))


def test_a_single_token_of_each():
    block, (z_p, z_l) = make(), tokens(1, 1)  # weights of 1, which have no gradient
    for ours, theirs in zip(block(z_p, z_l), written_out(block, z_p, z_l), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_both_uses_of_the_weights_train_the_queries():
    block, (z_p, z_l) = make(), tokens()
    query = block.gather.q.weight
    both = [torch.autograd.grad(out.square().sum(), query, retain_graph=True)[0] for out in block(z_p, z_l)]
    assert all(gradient.abs().max() > 1e-3 for gradient in both)
    nn.init.zeros_(block.gather.proj.weight)  # nothing is gathered: what is left comes by the scatter alone
    compressed, lookup = block(z_p, z_l)
    assert torch.autograd.grad(compressed.square().sum(), query, retain_graph=True)[0].abs().max() == 0
    assert torch.autograd.grad(lookup.square().sum(), query)[0].abs().max() > 1e-3


def test_the_compressed_path_is_timms_block():
    theirs = timm.models.vision_transformer.Block(DIM, HEADS, qkv_bias=True, init_values=0.3).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    block, (z_p, z_l) = make(init_values=1.0), tokens()
    missing, unexpected = block.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {
        *("gather", "ls_gather", "scatter", "ls_scatter", "norm_lookup", "mlp_lookup", "ls_lookup")
    }
    nn.init.zeros_(block.ls_gather.gamma)
    torch.testing.assert_close(block(z_p, z_l)[0], theirs(z_p), rtol=1e-9, atol=1e-10)


# --- options


def test_layer_scale_of_zero_leaves_tokens_as_they_are():
    block, (z_p, z_l) = make(init_values=0.5), tokens()
    scales = [value for name, value in block.named_parameters() if name.endswith("gamma")]
    assert len(scales) == 5
    for scale in scales:
        nn.init.zeros_(scale)
    assert all(map(torch.equal, block(z_p, z_l), (z_p, z_l)))
    assert LookupViTBlock(DIM, HEADS, init_values=1e-4).ls_scatter.gamma.tolist() == [pytest.approx(1e-4)] * DIM


def test_drop_path_drops_branches_of_whole_images_when_training():
    block, (z_p, z_l) = make(drop_path=1 - 1e-9), tokens()
    expected = written_out(block, z_p, z_l)
    assert all(map(torch.equal, block(z_p, z_l), (z_p, z_l)))
    for ours, theirs in zip(block.eval()(z_p, z_l), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)

    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 3, 2))
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)


def test_each_branch_is_dropped_by_itself():
    block, (z_p, z_l) = make(drop_path=0.5), tokens(batch=1)
    seen = {tuple(round(out.sum().item(), 6) for out in block(z_p, z_l)) for _ in range(300)}
    assert len(seen) > 20  # of 32: one decision for all would be 2


@pytest.mark.parametrize("option", ["proj_drop", "attn_drop"])
def test_dropout_is_for_training(option):
    block, (z_p, z_l) = make(**{option: 0.5}), tokens()
    with torch.no_grad():
        expected = written_out(block, z_p, z_l)
        assert not torch.allclose(block(z_p, z_l)[0], expected[0])
        for ours, theirs in zip(block.eval()(z_p, z_l), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_projections_start_at_one_size_whatever_the_width_and_however_fused():
    for dim in (32, 256):
        block = LookupViTBlock(dim, 4)
        for layer in (block.gather.q, block.gather.kv, block.attn.qkv, block.attn.proj, block.scatter.v):
            for part in layer.weight.split(dim):
                assert part.std().item() == pytest.approx(dim**-0.5, rel=0.1)
            assert not layer.bias.any()


# --- precision


def test_under_autocast_residuals_stay_float32():
    block = make().float()
    z_p, z_l = (z.detach().float() for z in tokens(20, 90))
    expected = block.double()(z_p.double(), z_l.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = block.float()(z_p, z_l)
    sum(out.square().mean() for out in found).backward()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()
    assert all(parameter.grad.isfinite().all() for parameter in block.parameters())


def test_bfloat16_throughout():
    block, (z_p, z_l) = make(), tokens(20, 90)
    expected = block(z_p, z_l)
    found = block.to(torch.bfloat16)(z_p.to(torch.bfloat16), z_l.to(torch.bfloat16))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < 0.03 * theirs.norm()


def test_an_empty_batch():
    assert [tuple(z.shape) for z in make()(*tokens(batch=0))] == [(0, 5, DIM), (0, 11, DIM)]


# --- what is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, "num_heads must divide dim = 24, got 5"),
        ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
        ({"dim": 24.0}, TypeError, "dim must be an int, got float"),
        ({"mlp_ratio": 0}, ValueError, "mlp_ratio must be above 0 and .* got 0"),
        ({"lookup_ratio": -2}, ValueError, "lookup_ratio must be above 0 and .* got -2"),
        ({"drop_path": 1.0}, ValueError, "drop_path must be from 0 to below 1, got 1.0"),
        ({"attn_drop": float("nan")}, ValueError, "attn_drop must be finite, got NaN"),
    ],
    ids=str,
)
def test_settings_that_are_refused(change, error, message):
    with pytest.raises(error, match=f"tokred_kernels.nn.LookupViTBlock: {message}"):
        LookupViTBlock(**{"dim": DIM, "num_heads": HEADS, **change})


@pytest.mark.parametrize(
    ("compressed", "lookup", "message"),
    [
        ((2, 12, DIM), (2, 11, DIM), "z_p must have from 1 to N = 11 tokens, the number of z_l, got 12"),
        ((2, 0, DIM), (2, 11, DIM), "z_p must have from 1 to N = 11 tokens"),
        ((2, 5, DIM), (3, 11, DIM), "z_p and z_l must have the same batch size, got 2 and 3"),
        ((2, 5, 8), (2, 11, DIM), r"z_p must be \(B, tokens, 24\) as dim is 24, got \(2, 5, 8\)"),
        ((2, 5, DIM), (11, DIM), r"z_l must be \(B, tokens, 24\) as dim is 24, got \(11, 24\)"),
    ],
)
def test_tokens_that_are_refused(compressed, lookup, message):
    with pytest.raises(ValueError, match=f"tokred_kernels.nn.LookupViTBlock: {message}"):
        make().float()(torch.zeros(compressed), torch.zeros(lookup))
