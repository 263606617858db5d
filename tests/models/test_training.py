# SPDX-License-Identifier: MIT
"""Every method in the ways models are trained: norms that autocast leaves in float32, checkpoints of the older kind."""

import pytest
import torch
from torch import nn

import tokred_kernels as tk
from tokred_kernels.models.imports import import_timm
from tokred_kernels.patching import patch

timm = import_timm()
vit = timm.models.vision_transformer
TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
METHODS = {
    "tome": {"r": 4},
    "algm": {"layers": (0, 2), "threshold": 0.0},
    "evit": {"layers": (1, 2)},
    "dynamicvit": {"layers": (1, 2), "keep": (0.7, 0.5)},
    "diffrate": {},
}

pytestmark = pytest.mark.usefixtures("one_thread")


class FloatNorm(nn.LayerNorm):
    """What autocast makes of a norm on a GPU, and not on the CPU: float32 whatever comes."""

    def forward(self, x):
        return super().forward(x.float())


def float_norms(model):
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = FloatNorm
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [False, True])
def test_autocast_with_norms_of_q_and_k(method, training):
    model = float_norms(vit.VisionTransformer(**TINY, qk_norm=True))
    patch(model, method, **METHODS[method]).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 3, 48, 48))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("importance", [None, "class"])
def test_attention_takes_autocasts_dtype_as_torchs_does(importance):
    q, k, v = torch.randn(3, 2, 3, 17, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = tk.token_attention(q, k.bfloat16(), v, importance=importance)
        gathered, lse = tk.lookup_gather(q[:, :, :5], k, v)
        scattered = tk.lookup_scatter(q[:, :, :5], k, gathered, lse)
    out = out if importance is None else out[0]
    assert out.dtype == gathered.dtype == scattered.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    exact = tk.token_attention(q, k.bfloat16().float(), v)
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert tk.token_attention(q.double(), k.double(), v.double(), importance="mean")[0].dtype == torch.float64


@pytest.mark.parametrize("method", ["dynamicvit", "diffrate"])
def test_the_older_checkpoints_lose_no_gradient(method):
    def gradients(reentrant):
        torch.manual_seed(0)
        model = patch(vit.VisionTransformer(**TINY), method, **METHODS[method]).train()
        model.set_grad_checkpointing(True)
        before = timm.layers.use_reentrant_ckpt()
        timm.layers.set_reentrant_ckpt(reentrant)
        try:
            torch.manual_seed(1)
            model(torch.randn(2, 3, 48, 48)).square().sum().backward()
        finally:
            timm.layers.set_reentrant_ckpt(before)
        return {name: p.grad for name, p in model.named_parameters()}

    expected, got = gradients(False), gradients(True)
    for name, gradient in expected.items():
        assert (gradient is None) == (got[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient)


def test_blocks_whose_forward_was_replaced_are_refused():
    model = vit.VisionTransformer(**TINY)
    block = model.blocks[1].attn
    block.forward = block.forward
    with pytest.raises(RuntimeError, match=r"the forward of blocks.1.attn has been replaced.*patch the model first"):
        patch(model, "tome", r=4)
    del block.forward
    patch(model, "tome", r=4)
