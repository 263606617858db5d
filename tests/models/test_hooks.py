# SPDX-License-Identifier: MIT
"""Hooks and functions that users put on attention: a patched model calls them, or raises."""

import hf_models
import pytest
import torch
from method_settings import METHODS
from torch import nn

from tokred_kernels.models.imports import import_timm
from tokred_kernels.patching import patch

timm = import_timm()
SIZES = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
VIT = timm.models.vision_transformer.VisionTransformer
EVA = timm.models.eva.Eva

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_dynamo")


def make(kind=VIT, fused=True, **more):
    model = kind(**SIZES, **more).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def images(batch=2):
    return torch.randn(batch, 3, 48, 48)


REGISTER = {
    "forward": lambda module, see: module.register_forward_hook(lambda _, args, out: see(out)),
    "pre-forward": lambda module, see: module.register_forward_pre_hook(lambda _, args: see(args[0])),
    "backward": lambda module, see: module.register_full_backward_hook(lambda _, into, out: see(out[0])),
    "pre-backward": lambda module, see: module.register_full_backward_pre_hook(lambda _, out: see(out[0])),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("hook", REGISTER)
@pytest.mark.parametrize("kind", [VIT, EVA])
def test_hooks_on_attention_dropout_see_the_weights(kind, hook, fused):
    seen, model, x = [], make(kind, fused), images()
    patch(model, "tome", r=5)
    expected = model(x)
    handles = [REGISTER[hook](block.attn.attn_drop, seen.append) for block in model.blocks]
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    if "backward" in hook:
        y.sum().backward()
        seen.reverse()
    assert [weights.shape for weights in seen] == [(2, 3, tokens, tokens) for tokens in (37, 32, 27, 22)]
    if "forward" in hook:
        torch.testing.assert_close(seen[2].sum(-1), torch.ones(2, 3, 27))
    for handle in handles:
        handle.remove()
    seen.clear()
    model(x).sum().backward()
    assert not seen


@pytest.mark.parametrize("method", METHODS)
def test_hooks_see_the_weights_of_every_method(method):
    seen, model = [], patch(make(), method, **METHODS[method])
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out.shape[-1]))
    model(images())
    assert seen == [attended for attended, _ in model.tokred_trace.counts]


def test_hooks_see_the_weights_of_each_packed_image():
    seen, model = [], patch(make(), "algm", layers=(0, 2), threshold=0.2, count="image")
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    model(images())
    lengths = model.tokred_trace.counts[2][0]
    assert seen[3:5] == [(1, 3, length, length) for length in lengths]


def test_a_hook_may_change_the_weights():
    plain, x = make(fused=False), images()

    def first_only(_, args, weights):
        return nn.functional.one_hot(torch.zeros(weights.shape[:-1], dtype=torch.int64), weights.shape[-1]).float()

    for block in plain.blocks:
        block.attn.attn_drop.register_forward_hook(first_only)
    expected = plain(x)
    torch.testing.assert_close(patch(plain, "tome", r=0)(x), expected, rtol=1e-4, atol=1e-5)


def test_without_fused_attention_another_module_may_take_the_place_of_dropout():
    class Recorder(nn.Module):
        def forward(self, weights):
            seen.append(weights.shape[-1])
            return weights

    seen, model = [], patch(make(fused=False), "tome", r=5)
    for block in model.blocks:
        block.attn.attn_drop = Recorder()
    for training in (False, True):
        model.train(training)(images())
    assert seen == [37, 32, 27, 22] * 2


def test_hooks_compile():
    seen, model, x = [], patch(make(fused=False), "tome", r=5), images()
    for block in model.blocks:
        block.attn.attn_drop.register_forward_hook(lambda _, args, out: seen.append(out.sum()))
    expected = model(x)
    seen.clear()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 4


def attention(module, query, key, value, attention_mask, **kwargs):
    return query.transpose(1, 2), None


def test_attention_functions_of_others_are_refused():
    transformers = hf_models.transformers
    transformers.AttentionInterface.register("its_own", attention)
    try:
        model, x = hf_models.make("vit"), hf_models.images()
        model.set_attn_implementation("its_own")
        with pytest.raises(NotImplementedError, match=r"does not call the attention .* 'its_own'; call .*\"sdpa\""):
            patch(model, "tome", r=5)
        model.set_attn_implementation("sdpa")
        expected = patch(model, "tome", r=5)(x).logits
        model.set_attn_implementation("its_own")
        with pytest.raises(NotImplementedError, match="its_own"):
            model(x)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(x).logits, expected, rtol=1e-4, atol=1e-5)
    finally:
        transformers.AttentionInterface._global_mapping.pop("its_own")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_hooks_on_attention_of_transformers_find_no_weights(implementation):
    """In the place of the weights there is nothing, rather than something else of four dimensions."""
    seen, model = [], hf_models.make("vit, encoder")
    model.set_attn_implementation(implementation)
    for layer in patch(model, "tome", r=5).layers:
        layer.attention.register_forward_hook(lambda _, args, out: seen.append(out[:2]))
    model(hf_models.images())
    assert [out.shape[1] for out, _ in seen] == [37, 32, 27, 22]
    assert all(weights is None for _, weights in seen)
