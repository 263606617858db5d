# SPDX-License-Identifier: MIT
"""DiffRate in timm's models: the numbers against a plain rewriting of the paper, given counts and learned ones."""

import copy
import itertools
import json
import pickle

import pytest
import torch
from pruning_models import rates, set_counts
from torch import nn
from written_out import load_dense

from tokred_kernels import flops, use_backend
from tokred_kernels.methods.diffrate import compression_flops, kept_counts
from tokred_kernels.methods.diffrate.method import LEAST_SIZE
from tokred_kernels.models.imports import import_timm
from tokred_kernels.models.state import TokenState
from tokred_kernels.models.timm import patched as timm_patched
from tokred_kernels.patching import patch, unpatch

timm = import_timm()
VisionTransformer = timm.models.vision_transformer.VisionTransformer
VisionTransformerDistilled = timm.models.deit.VisionTransformerDistilled

dense_diffrate = load_dense("diffrate")

# 36 patches, so 37 tokens with a class token; head width 16.
TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
MODELS = {
    "vit": (VisionTransformer, {}),
    "distilled": (VisionTransformerDistilled, {}),
    "registers": (VisionTransformer, {"reg_tokens": 4}),
    "q and k norm, layer scale": (VisionTransformer, {"qk_norm": True, "init_values": 0.5, "scale_attn_norm": True}),
    "mean": (VisionTransformer, {"global_pool": "avg"}),
}
# For each block, the counts after pruning and after merging.
COUNTS = {
    "both": ([37, 30, 21, 12], [35, 25, 17, 9]),
    "pruning": ([33, 20, 20, 9], [41, 41, 41, 41]),
    "merging": ([41, 41, 41, 41], [36, 19, 18, 7]),
    "rising": ([41, 17, 30, 13], [41, 19, 30, 15]),
    "at once": ([6, 41, 41, 41], [6, 41, 41, 41]),
    "nothing": ([41, 41, 41, 41], [50, 41, 41, 41]),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def make(name="vit", **more):
    kind, settings = MODELS[name]
    model = kind(**{**TINY, **settings, **more}).eval()
    for parameter in model.parameters():  # timm's initial biases and tokens are zero or tiny, and would test nothing
        nn.init.normal_(parameter, std=0.2)
    return model


def images(batch=2, size=48):
    return torch.randn(batch, 3, size, size)


def given(which="both"):
    prune, merge = COUNTS[which]
    return {"prune_kept_num": prune, "merge_kept_num": merge}


def learned(name="vit", counts=None, granularity=1, **more):
    """A model that learns its counts, from logits drawn, or, with one pair a block, from those counts."""
    model = patch(make(name, **more), "diffrate", granularity=granularity)
    for index, rate in enumerate(rates(model)):
        # So that each count is lower than the one before it, and every one removes tokens.
        nn.init.normal_(rate.selected_probability, std=0.3).data += (5 - 1.5 * index) * rate.kept_token_candidate / 36
    if counts is not None:
        set_counts(model, counts)
    return model


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("which", COUNTS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_paper_written_out(name, which, backend):
    model, x = make(name).double(), images().double()
    kept = {key: [max(n, model.num_prefix_tokens + 1) for n in value] for key, value in given(which).items()}
    with torch.no_grad():
        expected, sizes, sources = dense_diffrate.forward(model, x, *kept.values())
        patch(model, "diffrate", kept=kept)
        with use_backend(backend):
            tokens = model.forward_features(x)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.token_sizes[..., 0].double(), sizes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.token_map.source(torch.float64), sources, rtol=0, atol=0)


def test_sizes_change_the_attention():
    model, x = make().double(), images().double()
    with torch.no_grad():
        expected, _, _ = dense_diffrate.forward(model, x, *COUNTS["both"], proportional=False)
        without = patch(model, "diffrate", kept=given(), prop_attn=False).forward_features(x)
        with_sizes = patch(unpatch(model), "diffrate", kept=given()).forward_features(x)
    torch.testing.assert_close(without, expected, rtol=1e-5, atol=1e-6)
    assert (with_sizes - without).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_prefix_tokens_stay_first_and_alone(name):
    model = make(name)
    prefix = model.num_prefix_tokens
    least = [prefix + 1] * 4
    patch(model, "diffrate", kept={"prune_kept_num": [20] * 4, "merge_kept_num": least})
    model(images())
    dest = model.token_map.dest
    assert model.token_map.num_out == prefix + 1
    assert torch.equal(dest[:, :prefix], torch.arange(prefix, dtype=torch.int32).expand(2, -1))
    assert (dest[:, prefix:] != prefix - 1).all()
    assert (dest == -1).sum(1).tolist() == [36 + prefix - 20] * 2
    assert (model.token_sizes[:, :prefix] == 1).all()


def test_nothing_to_remove_changes_nothing_to_the_bit():
    model, x = make(), images()
    expected = model(x)
    assert torch.equal(patch(model, "diffrate", kept=given("nothing"))(x), expected)
    assert model.token_map.num_out == 37


def test_when_training_given_counts_remove_tokens_and_weights_get_gradients():
    model = patch(make().double(), "diffrate", kept=given()).train()
    x = images().double()
    dense = unpatch(copy.deepcopy(model))
    model.forward_features(x).square().sum().backward()
    dense_diffrate.forward(dense, x, *COUNTS["both"])[0].square().sum().backward()
    for (name, own), other in zip(model.named_parameters(), dense.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_sizes_stay_above_zero_where_opposite_tokens_join():
    model = make(pos_embed="none")
    with torch.no_grad():  # all that is left of a token is whether its patch is bright or dark
        for block in model.blocks:
            block.attn.proj.weight.zero_()
            block.attn.proj.bias.zero_()
        model.patch_embed.proj.bias.zero_()
        model.cls_token.normal_()
    dark = torch.ones(1, 3, 48, 48)
    dark[..., :, 8:] = -1  # the first column of patches bright, and all others dark
    patch(model, "diffrate", kept={"prune_kept_num": [37] * 4, "merge_kept_num": [2] * 4})
    with torch.no_grad():
        y = model(torch.cat([dark, -dark]))
    assert y.isfinite().all()
    assert (model.token_sizes > 0).all()
    assert model.token_sizes.min() == LEAST_SIZE, "no size fell under zero, and this shows nothing"


@pytest.mark.parametrize("which", COUNTS)
def test_count_agrees_with_torchs_counter(which):
    model = patch(make().requires_grad_(False), "diffrate", kept=given(which))
    with flops.counter(display=False) as counter:
        model(images())
    assert flops.count(model).total == pytest.approx(counter.get_total_flops() / 2, rel=1e-9)


def test_compiles_whole():
    model, x = patch(make(), "diffrate", kept=given()), images()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    assert model.token_map.num_out == 9


def test_images_of_any_size():
    model = patch(make(dynamic_img_size=True), "diffrate", kept=given())
    for size, tokens in ((48, (37, 35, 25, 17, 9)), (64, (65, 35, 25, 17, 9)), (24, (10, 10, 10, 10, 9))):
        model(images(size=size))
        assert flops.count(model, size).tokens == tokens
        assert model.token_map.num_out == 9


def test_counts_hold_for_images_of_a_size_set_later():
    kept = {"prune_kept_num": [37, 37, 30, 12], "merge_kept_num": [37, 37, 25, 9]}
    late = patch(make(), "diffrate", kept=kept)
    late.set_input_size(img_size=96)
    early = make()
    early.set_input_size(img_size=96)
    early.load_state_dict(late.state_dict())
    patch(early, "diffrate", kept=kept)
    x = images(size=96)
    assert torch.equal(late(x), early(x))
    assert [left for _, left in late.tokred_trace.counts] == [37, 37, 25, 9]


@pytest.mark.parametrize(("kept", "asked"), [(41, 0), (37, 0), (36, 1)])
def test_importance_is_asked_for_only_where_tokens_go(kept, asked, monkeypatch):
    model = patch(make(), "diffrate", kept={"prune_kept_num": [kept] + [41] * 3, "merge_kept_num": [41] * 4})
    wanted, attend = [], timm_patched.attend

    def count(*tokens, importance, **more):
        wanted.append(importance)
        return attend(*tokens, importance=importance, **more)

    monkeypatch.setattr(timm_patched, "attend", count)
    model(images())
    assert wanted == ["class"] * asked + [None] * (4 - asked)


def test_autocast_keeps_sizes_in_float32():
    for model in (patch(make(), "diffrate", kept=given()), learned().train()):
        x = images()
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert model.token_sizes.dtype == torch.float32
        assert y.dtype == torch.bfloat16
        assert nn.functional.cosine_similarity(y.float(), expected).min() > 0.8


def test_reads_published_text_and_files(tmp_path):
    model, x = make(), images()
    expected = patch(model, "diffrate", kept=given())(x)
    text = {key: json.dumps(value) for key, value in given().items()}
    file = tmp_path / "kept.json"
    file.write_text(json.dumps(text))
    for kept in (text, str(file), file, {**given(), "gflops": 3.0}):
        assert torch.equal(patch(unpatch(model), "diffrate", kept=kept)(x), expected)
    file.write_text("kept: 3")
    with pytest.raises(ValueError, match=r"the file .*kept\.json, must be JSON"):
        patch(make(), "diffrate", kept=file)


@pytest.mark.parametrize("name", MODELS)
def test_evaluating_uses_the_counts_as_they_stand(name):
    model, x = learned(name), images()
    prune, merge = kept_counts(model)
    assert prune[0] == merge[0] == 36 + model.num_prefix_tokens
    removing = [n for pair in zip(prune, merge, strict=True) for n in pair][1:]
    assert all(after < before for before, after in itertools.pairwise(removing)), "not every count removes tokens"
    counted = flops.count(model)
    y = model(x)
    left = model.token_map.num_out
    assert left == min(prune + merge)
    plain = patch(unpatch(copy.deepcopy(model)), "diffrate", kept={"prune_kept_num": prune, "merge_kept_num": merge})
    torch.testing.assert_close(plain(x), y, rtol=1e-4, atol=1e-5)
    assert flops.count(plain) == counted
    assert compression_flops(model).item() == pytest.approx(counted.gflops, rel=1e-6)


@pytest.mark.parametrize("granularity", [1, 5])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", ["vit", "distilled", "q and k norm, layer scale"])
def test_training_equals_the_paper_written_out(name, backend, granularity):
    model, x = learned(name, granularity=granularity).double().train(), images().double()
    weights = torch.randn(2, 36 + model.num_prefix_tokens, 48, dtype=torch.float64)
    plain = unpatch(copy.deepcopy(model))
    logits = [rate.selected_probability for rate in rates(model)]
    copies = [own.detach().clone().requires_grad_() for own in logits]
    pairs = [None, *zip(copies[2::2], copies[3::2], strict=True)]
    candidates = model.blocks[1].prune_ddp.kept_token_candidate.detach()
    expected, sizes, masks = dense_diffrate.forward_masked(plain, x, pairs, candidates)
    assert int(masks[0].sum()) == min(map(min, kept_counts(model)))
    with use_backend(backend):
        tokens = model.forward_features(x)
        (tokens * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.token_sizes[..., 0].double(), sizes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.tokred_trace.state.policy, masks, rtol=0, atol=1e-12)
    found = 0
    for own, other in zip(logits, copies, strict=True):
        mine, theirs = (torch.zeros_like(t) if t.grad is None else t.grad for t in (own, other))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        found += bool(mine.abs().max() > 1e-3)
    # Those of the first block have no choice, and no attention follows the last one.
    assert found == 4


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_masking_equals_pruning(backend):
    counts = [37, 30, 21, 12], [37, 37, 37, 37]
    model, x = learned(counts=counts).double(), images().double()
    assert kept_counts(model) == counts
    with use_backend(backend), torch.no_grad():
        pruned = model(x)
        assert model.token_map.num_out == 12
        masked = model.train()(x)
    assert model.token_map.num_out == 37
    # The published policy adds 1e-6 to every sum.
    torch.testing.assert_close(masked, pruned, rtol=1e-3, atol=1e-4)
    tokens = model.eval().forward_features(x), model.train().forward_features(x)
    torch.testing.assert_close(tokens[1][:, :12], tokens[0], rtol=1e-3, atol=1e-3)


def test_masked_tokens_never_come_back():
    model = learned(counts=([37, 30, 21, 12], [37, 28, 19, 10])).train()
    block, policy = model.blocks[2], (torch.arange(37) < 28).float().expand(2, -1)
    # In the worst case, masked tokens have a higher importance than the others.
    worth = torch.arange(37.0).expand(2, -1)
    x, keys = torch.randn(2, 37, 48), torch.randn(2, 3, 37, 16)
    _, state, token_map = block.tokred_reducer.reduce(block, x, keys, worth, TokenState(policy=policy))
    assert torch.equal(state.policy, (torch.arange(37) < 19).float().expand(2, -1))
    assert token_map.dest[0].tolist() == [0, *range(27, 0, -1), *range(28, 37)]


def test_a_training_step_reaches_weights_and_counts_under_checkpointing_too():
    model, x = learned().train(), images()
    model(x).square().sum().backward()
    expected = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    for own, other in zip(model.parameters(), expected, strict=True):
        assert (own.grad is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(own.grad, other, rtol=1e-4, atol=1e-5)
    assert model.blocks[1].prune_ddp.selected_probability.grad.abs().max() > 0


def test_state_dicts_round_trip_under_the_published_names():
    model, x = learned(granularity=4), images()
    state = model.state_dict()
    assert state["blocks.0.prune_ddp.selected_probability"].shape == (1,)
    assert state["blocks.3.merge_ddp.kept_token_candidate"].tolist() == list(range(36, 0, -4))
    other = patch(make(), "diffrate", granularity=4)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(x), model(x))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x))
    twin = copy.deepcopy(model)
    nn.init.constant_(twin.blocks[3].prune_ddp.selected_probability, 0)
    assert kept_counts(twin) != kept_counts(model)


@pytest.mark.parametrize("kept", [None, given()])
def test_unpatch_restores_to_the_bit(kept):
    model, x = make(), images()
    expected, names, modules = model(x), list(model.state_dict()), list(model.named_modules())
    patch(model, "diffrate", kept=kept)
    assert not torch.equal(model(x), expected)
    unpatch(model)
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == names
    assert list(model.named_modules()) == modules
    assert "tokred_reducer" not in vars(model.blocks[0])


@pytest.mark.parametrize(
    "kept,error,words",
    [
        (3, TypeError, r'kept must be a path, a dict with "prune_kept_num" and "merge_kept_num", or None, got int'),
        ({}, ValueError, r'must have "prune_kept_num" and "merge_kept_num", got no keys'),
        (
            {"ViT-S-DeiT": {}},
            ValueError,
            r"got the keys 'ViT-S-DeiT'; of the published compression_rate.json, give one",
        ),
        ({"prune_kept_num": [9] * 4}, ValueError, r"got the keys 'prune_kept_num'"),
        (given() | {"prune_kept_num": "[1, 2"}, ValueError, r"prune_kept_num must be a list, got the text '\[1, 2'"),
        (given() | {"prune_kept_num": 9}, TypeError, "prune_kept_num must be a list with one int per block, got 9"),
        (given() | {"merge_kept_num": [9] * 3}, ValueError, "must have one number for each block, got 4 and 3"),
        (given() | {"merge_kept_num": [9, 9.5, 9, 9]}, TypeError, r"merge_kept_num\[1\] must be an int, got 9.5"),
        (given() | {"merge_kept_num": [9, True, 9, 9]}, TypeError, r"merge_kept_num\[1\] must be an int, got True"),
        (given() | {"prune_kept_num": [9, 9, 1, 9]}, ValueError, r"prune_kept_num\[2\] must be at least 2, the prefix"),
        ("no/such.json", FileNotFoundError, "no/such.json"),
    ],
)
def test_wrong_counts_are_refused(kept, error, words):
    model = make()
    before = type(model)
    with pytest.raises(error, match=words):
        patch(model, "diffrate", kept=kept)
    assert type(model) is before


@pytest.mark.parametrize(
    "settings,error,words",
    [
        ({"granularity": 0}, ValueError, "granularity must be at least 1, got 0"),
        ({"granularity": 1.5}, TypeError, "granularity must be an int"),
        ({"prop_attn": 1}, TypeError, "prop_attn must be True or False, got 1"),
        ({"trace": None}, TypeError, "trace must be True or False, got None"),
    ],
)
def test_wrong_settings_are_refused(settings, error, words):
    with pytest.raises(error, match=words):
        patch(make(), "diffrate", **settings)


def test_a_class_token_is_needed():
    model = VisionTransformer(**TINY, class_token=False, global_pool="avg")
    with pytest.raises(NotImplementedError, match='"diffrate" sorts tokens by the attention of the class token'):
        patch(model, "diffrate", kept=given())


@pytest.mark.parametrize("pool", ["max", "avgmax", "map"])
def test_pools_that_see_masked_tokens_take_given_counts_alone(pool):
    model = make(global_pool=pool)
    with pytest.raises(NotImplementedError, match="which pooling by global_pool="):
        patch(model, "diffrate")
    assert patch(model, "diffrate", kept=given())(images()).isfinite().all()


def test_counts_are_learned_on_all_tokens():
    model = learned(patch_drop_rate=0.5)
    model(images())
    with pytest.raises(ValueError, match="counts are learned on all 37 tokens of an image, got 19"):
        model.train()(images())


@pytest.mark.parametrize(
    ("evaluating", "words"), [((0, 1), "counts are learned on all 37"), ((2,), "got masked tokens")]
)
def test_blocks_must_train_or_evaluate_alike(evaluating, words):
    model = learned(counts=COUNTS["both"]).train()
    for index in evaluating:
        model.blocks[index].eval()
    with pytest.raises(ValueError, match=f"{words}.* put all blocks into one mode"):
        model(images())
