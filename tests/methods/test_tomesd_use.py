# SPDX-License-Identifier: MIT
"""ToMe in diffusers' models: everything a denoiser is used for, and what is refused."""

import copy
import pickle
import sys
from types import SimpleNamespace

import denoisers
import pytest
import torch
from denoisers import ALL, diffusers, inputs, make, patched, run
from torch import nn
from torch.utils.checkpoint import checkpoint

from tokred_kernels.models.diffusers.merging import BasicTransformerBlock, MergingBlock
from tokred_kernels.models.imports import import_diffusers
from tokred_kernels.models.spec import PATCH_INFO
from tokred_kernels.patching import unpatch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def matches(monkeypatch):
    return denoisers.record_matches(monkeypatch)


# --- what a model is used for


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_checkpoints_merge_alike_when_they_compute_again(name, matches):
    model = make(name).train()
    generator = torch.Generator().manual_seed(0)
    patched(model, generator=generator, **ALL)
    results = []
    for checkpointing in (False, True):
        generator.manual_seed(0)
        torch.manual_seed(0)  # DiT drops labels
        if checkpointing:
            model.enable_gradient_checkpointing()
        matches.clear()
        model.zero_grad()
        run(model, inputs(name)).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        assert len(matches) == (3 if name == "unet" else 2)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_model_merges_alike_or_raises(reentrant):
    model, x = patched(make("dit")), inputs("dit")
    latent = x["hidden_states"].requires_grad_()
    expected = torch.autograd.grad(run(model, x).square().sum(), latent)
    torch.rand(3)

    def through_a_checkpoint():
        out = checkpoint(lambda y: run(model, {**x, "hidden_states": y}), latent, use_reentrant=reentrant)
        out.square().sum().backward()

    through_a_checkpoint()
    assert torch.equal(latent.grad, expected[0])
    patched(unpatch(model), generator=torch.Generator())
    with pytest.raises(RuntimeError, match="patch the model without generator="):
        through_a_checkpoint()


def test_unpatching_restores_everything():
    model = make()
    expected, classes = run(model, inputs()), [type(module) for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    keys, config = list(model.state_dict()), model.to_json_string()
    patched(model, max_downsample=2, **ALL)
    assert list(model.state_dict()) == keys
    assert model.to_json_string() == config
    assert type(model) is diffusers.UNet2DConditionModel
    assert str(getattr(model, PATCH_INFO)).startswith(
        '"tomesd", ratio=0.5, max_downsample=2, stride=(2, 2), random=True'
    )
    run(model, inputs())
    unpatch(model)
    assert [type(module) for module in model.modules()] == classes
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not any(name.startswith("tokred") for module in model.modules() for name in vars(module))
    assert torch.equal(run(model, inputs()), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_patched_on_their_own(duplicate):
    model, arguments = make("dit"), inputs("dit")
    plain = run(model, arguments)
    patched(model, random=False, generator=torch.Generator())
    merged = run(model, arguments)
    twin = duplicate(model)
    assert torch.equal(run(twin, arguments), merged)
    assert torch.equal(run(unpatch(twin), arguments), plain)
    assert torch.equal(run(model, arguments), merged)


@pytest.mark.parametrize(("name", "part"), [("unet", "unet"), ("dit", "transformer")])
def test_pipelines_give_their_denoiser(name, part):
    model, arguments = make(name), inputs(name)
    expected = run(model, arguments)
    pipeline = SimpleNamespace(**{"unet": None, part: model})
    assert patched(pipeline) is pipeline
    assert not torch.equal(run(model, arguments), expected)
    with pytest.raises(ValueError, match=r'already patched \("tomesd", ratio=0.5, .*\); call tokred_kernels.unpatch'):
        patched(model)
    assert unpatch(pipeline) is pipeline
    assert torch.equal(run(model, arguments), expected)


def test_attention_takes_what_it_took():
    """A processor sees merged tokens, the caller's arguments, and nothing of ours; the caller's stay as they were."""
    seen = []

    class Processor:
        def __call__(
            self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, strength=None, tokred_run=None
        ):
            seen.append((hidden_states.shape[1], strength, tokred_run))
            return hidden_states

    model, arguments, own = patched(make("dit")), inputs("dit"), {"strength": 2}
    for block in model.transformer_blocks:
        block.attn1.set_processor(Processor())
    model(**arguments, cross_attention_kwargs=own)
    model(arguments["hidden_states"], arguments["timestep"], arguments["class_labels"], own)
    assert own == {"strength": 2}
    assert seen == [(32, 2, None)] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_and_autocast(dtype):
    model, arguments = patched(make(), random=False, **ALL), inputs(size=(8, 8))
    expected = run(model, arguments)
    with torch.autocast("cpu", dtype):
        mixed = run(model, arguments)
    assert mixed.dtype == dtype
    mixed.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    low = run(model.to(dtype), inputs(size=(8, 8), dtype=dtype))
    for result in (mixed, low):  # some tokens go elsewhere, for their similarities are rounded
        assert torch.corrcoef(torch.stack([result.float().flatten(), expected.flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("name", ["unet", "dit"])
def test_compiles_in_one_graph(name, random):
    torch.compiler.reset()
    model, arguments = patched(make(name), random=random, merge_mlp=True), inputs(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for first in (7, 8):
        arguments["timestep"] = torch.tensor([first, 14])
        assert torch.equal(run(compiled, arguments), run(model, arguments))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated", "ignore:Dynamo detected a call")
def test_compiled_checkpoints_merge_alike_when_they_compute_again():
    model, arguments, gradients = patched(make("dit", num_layers=1)), inputs("dit"), []
    for checkpointing in (False, True):
        torch.compiler.reset()
        if checkpointing:
            model.enable_gradient_checkpointing()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
        torch.manual_seed(0)
        loss = run(compiled, arguments).square().sum()
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(loss, model.parameters(), allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ratio": 1}, ValueError, r"ratio must be in \[0, 1\), got 1"),
        ({"ratio": -0.1}, ValueError, "got -0.1"),
        ({"ratio": float("nan")}, ValueError, r"ratio must be in \[0, 1\), got nan"),
        ({"ratio": "0.5"}, TypeError, "ratio must be a number"),
        ({"ratio": True}, TypeError, "ratio must be a number"),
        ({"max_downsample": 3}, ValueError, "max_downsample must be 1, 2, 4 or 8, got 3"),
        ({"max_downsample": 2.0}, TypeError, "max_downsample must be an int, got float"),
        ({"stride": 2}, TypeError, "stride must be a pair"),
        ({"stride": (2, 0)}, ValueError, "stride width must be at least 1, got 0"),
        ({"stride": (1, 1)}, ValueError, "stride must leave sources"),
        ({"random": 1}, TypeError, "random must be True or False, got 1"),
        ({"merge_mlp": None}, TypeError, "merge_mlp must be True or False"),
        ({"merge_attn": False}, ValueError, "one of merge_attn, merge_crossattn, merge_mlp must be True"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
        ({"merge_attn": False, "merge_crossattn": True}, ValueError, "a model without cross attention"),
    ],
)
def test_wrong_settings(settings, error, message):
    model = make("dit")
    with pytest.raises(error, match=message):
        patched(model, **settings)
    assert not hasattr(model, PATCH_INFO)
    assert not any(type(module) is MergingBlock for module in model.modules())


def test_models_without_known_blocks():
    sd3 = {"sample_size": 4, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2}
    more = {"joint_attention_dim": 8, "caption_projection_dim": 8, "pooled_projection_dim": 8, "pos_embed_max_size": 4}
    for model in (
        diffusers.SD3Transformer2DModel(**sd3, **more),
        nn.Linear(2, 2),
        SimpleNamespace(unet=nn.Linear(2, 2)),
    ):
        with pytest.raises(
            NotImplementedError, match=r"nothing was patched: .* is not supported; supported are diffusers' UNet2D"
        ):
            patched(model)
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    with pytest.raises(NotImplementedError, match=r"nothing was patched: .* has no known transformer blocks"):
        patched(make(**plain))
    with pytest.raises(NotImplementedError, match="Patch the UNet2DConditionModel inside it, before anything wraps it"):
        patched(nn.Sequential(make()))
    with pytest.raises(TypeError, match="got SimpleNamespace"):
        patched(SimpleNamespace(vae=nn.Linear(2, 2)))


def test_blocks_of_another_class():
    class Other(BasicTransformerBlock):
        pass

    model = make("dit")
    model.transformer_blocks[1].__class__ = Other
    with pytest.raises(NotImplementedError, match=r"transformer_blocks.1 of a DiTTransformer2DModel is a .*Other"):
        patched(model)
    assert type(model.transformer_blocks[0]) is BasicTransformerBlock
    discrete = {"num_vector_embeds": 9, "sample_size": 4, "num_attention_heads": 1, "attention_head_dim": 8}
    with pytest.raises(NotImplementedError, match="discrete latents"):
        patched(diffusers.models.Transformer2DModel(**discrete, num_embeds_ada_norm=4, norm_type="ada_norm"))


def test_forwards_that_were_replaced():
    model = make("dit")
    model.transformer_blocks[1].forward = model.transformer_blocks[1].forward
    with pytest.raises(RuntimeError, match=r"forward of transformer_blocks.1 has been replaced.*patch the model first"):
        patched(model)
    del model.transformer_blocks[1].forward
    patched(model)
    model.transformer_blocks[0].forward = model.transformer_blocks[0].forward
    with pytest.raises(RuntimeError, match="remove those again before"):
        unpatch(model)
    assert hasattr(model, PATCH_INFO)


def test_calls_that_cannot_merge():
    model, arguments = patched(make(), **ALL), inputs()
    with pytest.raises(NotImplementedError, match="does not support an attention_mask"):
        model(**arguments, attention_mask=torch.ones(2, 256))
    masked = run(model, {**arguments, "encoder_attention_mask": torch.ones(2, 5)})  # over the context: that may be
    assert masked.shape == arguments["sample"].shape
    with pytest.raises(NotImplementedError, match="ip_adapter_masks"):
        model(**arguments, cross_attention_kwargs={"ip_adapter_masks": [torch.ones(1, 1, 8, 8)]})
    model.transformer = model.down_blocks[0].attentions[0]
    with pytest.raises(RuntimeError, match="not model\\.forward"):
        model.transformer.forward(torch.randn(2, 32, 16, 16), arguments["encoder_hidden_states"])
    for block in model.modules():
        if type(block) is MergingBlock:
            block.set_chunk_feed_forward(1, 0)
    with pytest.raises(NotImplementedError, match="merge_mlp does not support a chunked feed-forward"):
        run(model, arguments)
    patched(unpatch(model), random=False)
    chunked = run(model, arguments)
    for block in model.modules():
        if type(block) is MergingBlock:
            block.set_chunk_feed_forward(None)
    torch.testing.assert_close(run(model, arguments), chunked)


def test_diffusers_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'pip install "tokred_kernels\[diffusers\]"'):
        import_diffusers()
