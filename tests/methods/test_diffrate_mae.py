# SPDX-License-Identifier: MIT
"""DiffRate as published for MAE, whose first and last blocks keep all tokens, and counts in published files."""

import copy
import itertools
import json

import pytest
import torch
from pruning_models import rates
from torch import nn
from written_out import load_dense

from tokred_kernels import flops
from tokred_kernels.methods.diffrate import compression_flops, kept_counts
from tokred_kernels.methods.diffrate.search import diffrate_search
from tokred_kernels.models.imports import import_timm
from tokred_kernels.models.reducer import BlockReducer
from tokred_kernels.patching import patch, unpatch

VisionTransformer = import_timm().models.vision_transformer.VisionTransformer
dense_diffrate = load_dense("diffrate")
PATCHES = 36
TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**settings):
    """A model as MAE's fine-tuning has it: the mean of the patches, normed after it."""
    model = VisionTransformer(**TINY, global_pool="avg", **settings).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def learned(frozen=(0, -1)):
    model = patch(make(), "diffrate", frozen=frozen)
    for index, rate in enumerate(rates(model)):
        nn.init.normal_(rate.selected_probability, std=0.3).data += (5 - 1.5 * index) * rate.kept_token_candidate / 36
    return model


def published_state(frozen):
    """Return a state dict with the published names and shapes, with a single candidate in the blocks `frozen`."""
    state = make().state_dict()
    for block, name in itertools.product(range(TINY["depth"]), ("prune_ddp", "merge_ddp")):
        candidates = torch.arange(PATCHES, 0, -(PATCHES + 1 if block in frozen else 1)).float()
        state[f"blocks.{block}.{name}.kept_token_candidate"] = candidates
        state[f"blocks.{block}.{name}.selected_probability"] = torch.randn(len(candidates))
    return state


@pytest.mark.parametrize(
    ("published", "frozen"), [((0,), (0,)), ((0, 3), (0, -1)), ((0, 3), [0, 3]), ((), ()), ((1, 2), (-3, -2))]
)
def test_published_state_dicts_load(published, frozen):
    model = patch(make(), "diffrate", frozen=frozen)
    state = published_state(published)
    model.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for index, counts in enumerate(zip(*kept_counts(model), strict=True)):
        assert (counts == (37, 37)) == (index in published)
        assert (type(model.blocks[index].tokred_reducer) is BlockReducer) == (index in published), (
            "a frozen block needs no sort"
        )
    if sorted(published) != [0]:
        with pytest.raises(RuntimeError, match=r"size mismatch for blocks\.\d\.prune_ddp"):
            patch(make(), "diffrate").load_state_dict(state)


def test_training_equals_the_paper_written_out():
    model, x = learned().double().train(), torch.randn(2, 3, 48, 48, dtype=torch.float64)
    plain = unpatch(copy.deepcopy(model))
    logits = [rate.selected_probability for rate in rates(model)]
    copies = [own.detach().clone().requires_grad_() for own in logits[2:-2]]
    pairs = [None, *zip(copies[::2], copies[1::2], strict=True), None]
    candidates = model.blocks[1].prune_ddp.kept_token_candidate.detach()
    tokens, sizes, masks = dense_diffrate.forward_masked(plain, x, pairs, candidates)
    assert int(masks[0].sum()) == min(map(min, kept_counts(model))) < 37
    # The mean as published: its denominator has no gradient.
    weights = (sizes * masks)[:, 1:, None]
    expected = plain.head(plain.fc_norm((tokens[:, 1:] * weights).sum(1) / weights.sum(1).detach()))
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    target = torch.randn_like(found)
    (found * target).sum().backward()
    (expected * target).sum().backward()
    for own, other in zip(logits[2:-2], copies, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)
        assert own.grad.abs().max() > 1e-4
    assert all(frozen.grad is None for frozen in (*logits[:2], *logits[-2:]))
    for (name, own), other in zip(unpatch(model).named_parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_evaluation_removes_nothing_in_frozen_blocks():
    model, x = learned(), torch.randn(2, 3, 48, 48)
    counts = kept_counts(model)
    y = model(x)
    left = [after for _, after in model.tokred_trace.counts]
    assert left[0] == 37 and left[-1] == left[-2] < left[1] < 37
    assert flops.count(model).gflops == pytest.approx(compression_flops(model).item(), rel=1e-6)
    plain = patch(make(), "diffrate", kept=dict(zip(("prune_kept_num", "merge_kept_num"), counts, strict=True)))
    plain.load_state_dict(unpatch(model).state_dict())
    torch.testing.assert_close(plain(x), y, rtol=1e-4, atol=1e-5)


def test_the_search_leaves_frozen_blocks_alone():
    model = patch(make(), "diffrate", frozen=(0, -1))
    nn.init.normal_(model.blocks[3].prune_ddp.selected_probability)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(torch.randn(4, 3, 48, 48), torch.randint(0, 5, (4,)))]
    target = 0.8 * flops.count(make()).gflops
    found = diffrate_search(model, batches, target, steps=60, lr=0.1, progress=False)
    assert found.gflops == pytest.approx(target, rel=0.02)
    assert found.prune_kept_num[0] == found.prune_kept_num[3] == 37
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (name[:8] in ("blocks.1", "blocks.2") and "selected" in name), name
    assert "frozen=(0, -1)" in str(model.tokred_patch)


@pytest.mark.parametrize("side", ["few", "many"])
def test_the_reach_of_a_search_counts_frozen_blocks(side):
    model = patch(make(), "diffrate", frozen=(0, -1))
    with pytest.raises(ValueError, match="target_gflops must be from") as caught:
        diffrate_search(model, [], 1e-6 if side == "few" else 1e6, progress=False)
    least = {"prune_kept_num": [37, 2, 2, 37], "merge_kept_num": [37, 2, 2, 37]}
    counted = flops.count(patch(make(), "diffrate", kept=least)).gflops
    assert f"from {counted:.4g}, with the fewest" in str(caught.value)


@pytest.mark.parametrize(
    ("frozen", "error", "message"),
    [
        (0, TypeError, "frozen must be a tuple of ints, got 0"),
        ("0", TypeError, "frozen must be a tuple of ints, got '0'"),
        ((0, 4), ValueError, "frozen must be from -4 to 3, the last block, got 4"),
        ((-5,), ValueError, "frozen must be from -4 to 3, the last block, got -5"),
        ((1.0,), TypeError, "frozen must be an int, got float"),
        ((True,), TypeError, "frozen must be an int, got bool"),
    ],
)
def test_wrong_frozen_blocks_are_refused(frozen, error, message):
    model = make()
    with pytest.raises(error, match=message):
        patch(model, "diffrate", frozen=frozen)
    assert type(model) is VisionTransformer


# --- counts given


@pytest.mark.parametrize("stage", ["prune_kept_num", "merge_kept_num"])
def test_a_stage_of_none_removes_nothing(stage, tmp_path):
    """The published file has "None" for the pruning of its hierarchical models."""
    model, x = make(), torch.randn(2, 3, 48, 48)
    counts = {"prune_kept_num": "[37, 30, 20, 9]", "merge_kept_num": "[37, 30, 20, 9]", stage: "None"}
    (tmp_path / "kept.json").write_text(json.dumps(counts))
    expected = patch(model, "diffrate", kept={**counts, stage: [37] * 4})(x)
    assert model.token_map.num_out == 9
    for kept in (counts, tmp_path / "kept.json"):
        assert torch.equal(patch(unpatch(model), "diffrate", kept=kept)(x), expected)


def test_published_files_give_an_entry_for_the_model_that_it_fits(tmp_path):
    """One entry of a file that has others, of other depths and of models that only merge."""
    entries = {
        "ViT": {"1.0": {"prune_kept_num": "[37,30,20,9]", "merge_kept_num": "[37,25,20,9]"}},
        "hierarchical": {"5.2": {"prune_kept_num": "None", "merge_kept_num": "[36, 30, 20, 16, 9, 36, 9, 9]"}},
    }
    (tmp_path / "published.json").write_text(json.dumps(entries))
    file = json.loads((tmp_path / "published.json").read_text())
    model = patch(make(), "diffrate", kept=file["ViT"]["1.0"])
    model(torch.randn(1, 3, 48, 48))
    assert [after for _, after in model.tokred_trace.counts] == [37, 25, 20, 9]
    with pytest.raises(ValueError, match="merge_kept_num must have one number for each of 4 blocks, got 8"):
        patch(make(), "diffrate", kept=file["hierarchical"]["5.2"])
    with pytest.raises(ValueError, match=r"got the keys 'ViT', 'hierarchical'; .* give one entry"):
        patch(make(), "diffrate", kept=tmp_path / "published.json")


def test_a_merge_count_above_the_prune_count_merges_nothing():
    """Several published entries have such pairs."""
    x = torch.randn(2, 3, 48, 48)
    model = make()
    pairs = [([37, 30, 20, 9], [37, 33, 25, 12]), ([37, 30, 20, 9], [37, 37, 37, 37])]
    found = []
    for prune, merge in pairs:
        found.append(patch(model, "diffrate", kept={"prune_kept_num": prune, "merge_kept_num": merge})(x))
        assert (model.token_sizes == 1).all()
        unpatch(model)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"prune_kept_num": [37, 30, 20, 10**400]},
            ValueError,
            r"prune_kept_num\[3\] must be from 1 to 2147483647",
        ),
        ({"merge_kept_num": [37, -(10**400), 9, 9]}, ValueError, r"merge_kept_num\[1\] must be from 1 to 2147483647"),
        ({"gflops": -1.0}, ValueError, "kept gflops must be a number from 0 to .*, got -1.0"),
        ({"target_gflops": float("nan")}, ValueError, "kept target_gflops must be a number from 0 to .*, got nan"),
        ({"prune": [9] * 4}, ValueError, r"kept must have prune_kept_num, merge_kept_num; .* unknown: \['prune'\]"),
    ],
)
def test_wrong_counts_are_refused(change, error, message):
    kept = {"prune_kept_num": [37, 30, 20, 9], "merge_kept_num": [37, 25, 20, 9], **change}
    with pytest.raises(error, match=message):
        patch(make(), "diffrate", kept=kept)
