# SPDX-License-Identifier: MIT
"""ToMe in diffusers' models: the numbers against dense matrices, one match per block, and where draws come from."""

import copy

import denoisers
import pytest
import torch
from denoisers import ALL, MODELS, PARTS, diffusers, inputs, make, patched, run
from torch import nn
from written_out import load_dense

from tokred_kernels import TokenMap, use_backend
from tokred_kernels.methods import tomesd
from tokred_kernels.methods.tomesd import Run, ToMeSD
from tokred_kernels.models.diffusers.merging import RUN, BasicTransformerBlock, MergingBlock
from tokred_kernels.patching import unpatch

dense_tomesd = load_dense("tomesd")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def matches(monkeypatch):
    return denoisers.record_matches(monkeypatch)


# --- the numbers


CASES = {
    "attention": ("unet", {}),
    "cross attention": ("unet", {"merge_attn": False, "merge_crossattn": True}),
    "mlp": ("unet", {"merge_attn": False, "merge_mlp": True}),
    "all, everywhere": ("unet", {**ALL, "max_downsample": 2}),
    "all, cut to the sources": ("unet", {**ALL, "ratio": 0.95}),
    "all, other strides": ("unet", {**ALL, "stride": (3, 5), "ratio": 0.3}),
    "all, odd and rectangular": ("unet", {**ALL, "max_downsample": 2, "size": (15, 9)}),
    "dit, attention": ("dit", {}),
    "dit, mlp": ("dit", {"merge_attn": False, "merge_mlp": True, "stride": (1, 4)}),
    "pixart, all": ("pixart", {**ALL, "ratio": 0.7}),
    "pixart, rectangular": ("pixart", {**ALL, "size": (12, 20)}),
}


def grids_of(name, size, max_downsample):
    factors = (2,) if name != "unet" else (1, 2)[:max_downsample]
    return {-(-size[0] // f) * -(-size[1] // f): (-(-size[0] // f), -(-size[1] // f)) for f in factors}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_equals_dense_matrices(case, backend):
    name, settings = CASES[case]
    settings = {"ratio": 0.5, "stride": (2, 2), "merge_attn": True, "max_downsample": 1, "size": (16, 16), **settings}
    size = settings.pop("size")
    model, arguments = make(name).double(), inputs(name, size=size, dtype=torch.float64)
    parts = [part for switch, part in PARTS.items() if settings.get(switch)]
    with torch.no_grad():
        plain = run(model, arguments)
        grids = grids_of(name, size, settings["max_downsample"])
        with dense_tomesd.merging(grids, settings["ratio"], settings["stride"], parts):
            expected = run(model, arguments)
        with use_backend(backend):
            actual = run(patched(model, random=False, **settings), arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert (actual - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_ratio_0_changes_no_bit(name):
    model, arguments = make(name), inputs(name)
    expected = run(model, arguments)
    assert torch.equal(run(patched(model, ratio=0, **ALL), arguments), expected)


def test_gradients_equal_those_of_dense_matrices():
    model, arguments = make().double(), inputs(dtype=torch.float64)
    arguments["sample"].requires_grad_()
    wanted = [arguments["sample"], *model.parameters()]
    with dense_tomesd.merging(grids_of("unet", (16, 16), 2), 0.5, (2, 2), PARTS.values()):
        expected = torch.autograd.grad(run(model, arguments).square().sum(), wanted)
    patched(model, random=False, max_downsample=2, **ALL)
    actual = torch.autograd.grad(run(model, arguments).square().sum(), wanted)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


SMALL = {"dim": 24, "num_attention_heads": 3, "attention_head_dim": 8, "cross_attention_dim": 16}
POOLED = {"ada_norm_continous_conditioning_embedding_dim": 8, "ada_norm_bias": True}
BLOCKS = {
    "layer_norm": {},
    "self attention twice": {"double_self_attention": True, "cross_attention_dim": None},
    "cross attention twice": {"only_cross_attention": True},
    "no cross attention": {"cross_attention_dim": None},
    "gligen": {"attention_type": "gated"},
    "positions": {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 30},
    "ada_norm": {"norm_type": "ada_norm", "num_embeds_ada_norm": 10},
    "ada_norm_zero": {"norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10},
    "ada_norm_single": {"norm_type": "ada_norm_single"},
    "ada_norm_continuous": {"norm_type": "ada_norm_continuous", **POOLED},
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_all_but_the_merging_is_diffusers_own(kind, monkeypatch):
    """If no token moves, all blocks compute the same as unpatched, to the bit, in all three parts."""
    monkeypatch.setattr(tomesd, "match_cells", lambda x, *_: TokenMap.identity(*x.shape[:2]))
    block = BasicTransformerBlock(**{**SMALL, **BLOCKS[kind]}).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    single, zero = kind == "ada_norm_single", kind == "ada_norm_zero"
    own = {"gligen": {"objs": torch.randn(2, 3, 16)}} if kind == "gligen" else {}
    arguments = {
        "hidden_states": torch.randn(2, 30, 24),
        "encoder_hidden_states": None if kind == "self attention twice" else torch.randn(2, 7, 16),
        "timestep": torch.randn(2, 6 * 24) if single else torch.tensor([3, 4]) if zero else torch.tensor(3),
        "class_labels": torch.tensor([1, 2]) if zero else None,
        "added_cond_kwargs": {"pooled_text_emb": torch.randn(2, 8)},
    }
    expected = block(**arguments, cross_attention_kwargs=own)
    block.__class__ = MergingBlock
    going = Run((5, 6), ToMeSD(random=False, **ALL))
    actual = block(**arguments, cross_attention_kwargs={**own, RUN: going})
    assert going.maps[block] is not None
    assert torch.equal(actual, expected)


# --- the match


def test_one_match_of_each_blocks_input(matches):
    model = patched(make(), max_downsample=2, **ALL)
    blocks = [module for module in model.modules() if type(module) is MergingBlock]
    entered = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    run(model, inputs())
    assert len(matches) == len(blocks) == 7
    for match, x in zip(matches, entered, strict=True):
        assert torch.equal(match["metric"], x)
        assert match["r"] == x.shape[1] // 2


@pytest.mark.parametrize(
    ("size", "settings", "grids"),
    [
        ((16, 16), {}, {(16, 16)}),
        ((27, 48), {"max_downsample": 2}, {(27, 48), (14, 24)}),  # a fifth of 1920 x 1080
        ((15, 9), {"max_downsample": 8}, {(15, 9), (8, 5)}),
        ((15, 9), {"max_downsample": 2, "downsample_padding": 0}, {(15, 9), (7, 4)}),
        ((5, 1), {"max_downsample": 2, "stride": (2, 1)}, {(5, 1), (3, 1)}),
        ((5, 2), {"max_downsample": 2}, {(5, 2)}),  # at 1/2 it is smaller than a cell
    ],
)
def test_grids_are_those_of_the_feature_maps(size, settings, grids, matches):
    model = make(downsample_padding=settings.pop("downsample_padding", 1))
    with torch.no_grad():
        assert run(patched(model, **settings), inputs(size=size)).shape == (2, 4, *size)
    assert {match["grid"] for match in matches} == grids


def test_max_downsample_picks_the_blocks():
    more = {"block_out_channels": (32,) * 4, "down_block_types": ("CrossAttnDownBlock2D",) * 4}
    model = make(**more, up_block_types=("CrossAttnUpBlock2D",) * 4)
    for max_downsample, count in ((1, 3), (2, 6), (4, 9), (8, 13)):
        patched(model, max_downsample=max_downsample)
        assert sum(type(module) is MergingBlock for module in model.modules()) == count
        unpatch(model)


def test_a_model_without_fine_blocks_says_what_it_needs():
    """As in SDXL, whose finest stage has no transformer."""
    more = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    model = make(**more, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))
    with pytest.raises(ValueError, match="nothing was patched: max_downsample must be at least 2"):
        patched(model)
    before = run(model, inputs())
    assert not torch.equal(run(patched(model, max_downsample=2), inputs()), before)


# --- the draws


def test_blocks_and_timesteps_have_draws_of_their_own_and_torch_does_not_notice(matches):
    model, arguments = patched(make(), max_downsample=2), inputs()
    torch_state = torch.get_rng_state()
    for timestep in (torch.tensor([7, 14]), torch.tensor([7.5, 14.0]), 8, None):
        if timestep is not None:
            arguments["timestep"] = timestep
        run(model, arguments)
    assert torch.equal(torch.get_rng_state(), torch_state)
    draws = [tuple(match["drawn"].tolist()) for match in matches]
    assert len(draws) == 4 * 7
    assert len(set(draws[:21])) == 21
    assert draws[14:21] == draws[21:]  # the same timestep, twice


def test_every_place_of_a_cell_is_drawn_about_as_often():
    counts, seed = torch.zeros(6), tomesd.seed_of(torch.tensor([981]), torch.device("cpu"))
    cells = 64 * 64 // 6
    for block in range(16):
        drawn = tomesd.hashed_places(seed, block, (128, 32, 2, 3, 0))
        counts += drawn.bincount(minlength=6)
        pairs = drawn[1:] * 6 + drawn[:-1]
        assert pairs.bincount(minlength=36).min() > 0
        assert len(set(drawn.tolist())) == 6
        cells = drawn.numel()
    # Six standard deviations of a fair die.
    expected = 16 * cells / 6
    assert (counts - expected).abs().max() < 6 * (expected * 5 / 6) ** 0.5


@pytest.mark.parametrize(("batch", "random"), [(1, True), (3, True), (2, False)])
def test_no_draws_for_odd_batches_or_when_not_asked(batch, random, matches):
    run(patched(make("dit"), random=random), inputs("dit", batch))
    assert [match["drawn"] for match in matches] == [None, None]


@pytest.mark.parametrize("name", MODELS)
def test_the_input_decides_the_output_whatever_ran_before(name):
    model, x = patched(make(name), max_downsample=2, **ALL), inputs(name)
    first = run(model, x)
    run(model, inputs(name, size=(8, 8)))
    torch.manual_seed(5)
    assert torch.equal(run(model, x), first)
    assert torch.equal(run(copy.deepcopy(model), x), first)
    assert not torch.equal(run(patched(unpatch(model), max_downsample=2, random=False, **ALL), x), first)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_timesteps_may_be_numbers_or_tensors_of_any_dtype(as_tensor, matches):
    model, arguments = patched(make()), inputs()
    for dtype in (torch.int64, torch.int32, torch.float32, torch.float64):
        timestep = torch.tensor(7, dtype=dtype) if as_tensor else 7.0 if dtype.is_floating_point else 7
        model(arguments["sample"], timestep, arguments["encoder_hidden_states"])
    draws = {tuple(match["drawn"].tolist()) for match in matches}
    assert len(draws) == len(matches) // 4


def test_transformers_that_are_not_patched_see_nothing_of_ours(caplog):
    """A key that reached them would reach their attention, which warns of arguments that it does not know."""
    diffusers.utils.logging.enable_propagation()
    try:
        run(patched(make()), inputs())
    finally:
        diffusers.utils.logging.disable_propagation()
    assert not caplog.records


def test_a_generator_makes_draws_again():
    generator, model = torch.Generator(), make("dit")
    patched(model, generator=generator)
    first, second, third = (run(model, (generator.manual_seed(seed), inputs("dit"))[1]) for seed in (3, 4, 3))
    assert torch.equal(first, third)
    assert not torch.equal(first, second)
    assert not torch.equal(first, run(model, inputs("dit")))


def pictures(pipe, **settings):
    """What the pipeline gives for a generator's seed and for torch's, each after something else has drawn."""
    by_generator = {"generator": torch.Generator().manual_seed(0)}
    for given in (by_generator, {}):
        torch.manual_seed(0)
        yield pipe([3, 4], num_inference_steps=3, output_type="np", **given, **settings).images


def test_a_seed_decides_the_picture_of_a_pipeline():
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    model, scheduler = make("dit", sample_size=8, out_channels=8), diffusers.DDIMScheduler()
    pipe = patched(diffusers.DiTPipeline(transformer=model, vae=vae, scheduler=scheduler))
    pipe.set_progress_bar_config(disable=True)
    first = list(pictures(pipe))
    torch.rand(7)
    pipe([5], num_inference_steps=2, output_type="np")
    assert all((one == other).all() for one, other in zip(first, pictures(pipe), strict=True))
    plain = list(pictures(unpatch(pipe)))
    assert all((one != other).any() for one, other in zip(first, plain, strict=True))
