# SPDX-License-Identifier: MIT
"""The search for DiffRate's counts: that it ends on the target, alone and together, and leaves the model as it was."""

import builtins
import copy
import json

import pytest
import torch
from processes import run_together
from torch import nn

from tokred_kernels import flops
from tokred_kernels.methods import progress
from tokred_kernels.methods.diffrate import kept_counts
from tokred_kernels.methods.diffrate.search import FoundRates, diffrate_search
from tokred_kernels.models.imports import import_timm
from tokred_kernels.patching import patch, unpatch

timm = import_timm()
LOOSE = {"progress": False, "tolerance": 1.0}
QUICK = {"steps": 3, **LOOSE}

pytestmark = pytest.mark.usefixtures("one_thread")


def make(**settings):
    settings = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, **settings}
    return timm.models.vision_transformer.VisionTransformer(num_classes=4, **settings).eval()


def data(number=3, batch=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch, 3, 48, 48, generator=generator), torch.randint(0, 4, (batch,), generator=generator))
        for _ in range(number)
    ]


def full(model):
    return flops.count(copy.deepcopy(model)).gflops


# --- what it finds


@pytest.mark.parametrize("share", [0.65, 0.85])
def test_reaches_the_target_and_leaves_the_counts_in_the_model(share, tmp_path, recwarn):
    model, file = make(), tmp_path / "found.json"
    target = share * full(model)
    found = diffrate_search(model, data(), target, steps=120, lr=0.06, save=file, progress=False)
    assert found.gflops == pytest.approx(target, rel=0.02)
    assert not recwarn
    assert found.prune_kept_num[0] == found.merge_kept_num[0] == 37
    assert (found.prune_kept_num, found.merge_kept_num) == kept_counts(model)
    images = data()[0][0]
    expected = model(images)
    assert flops.count(model).gflops == pytest.approx(found.gflops, rel=1e-6)
    # The file gives the same model without anything learned.
    assert json.loads(file.read_text()) == found._asdict()
    for kept in (file, found._asdict()):
        patch(unpatch(model), "diffrate", kept=kept)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
        assert flops.count(model).gflops == pytest.approx(found.gflops, rel=1e-6)


def test_the_loss_and_the_target_weigh_against_each_other():
    model = make()
    target = 0.8 * full(model)

    def keep_all(outputs, labels):
        return -2 * model.tokred_trace.state.policy.mean()  # the masks of all blocks together

    settings = {"steps": 80, "lr": 0.08, "criterion": keep_all, **LOOSE}
    light = diffrate_search(model, data(1, 2), target, flops_weight=1.0, **settings)
    assert light.gflops > target * 1.05
    heavy = diffrate_search(model, data(1, 2), target, flops_weight=1e4, **settings)
    assert heavy.gflops == pytest.approx(target, rel=0.02)


def test_goes_on_from_where_the_model_is():
    model = patch(make(), "diffrate", granularity=4)
    with torch.no_grad():
        for block in model.blocks[1:]:
            block.prune_ddp.selected_probability[0] = 20.0
            block.merge_ddp.selected_probability[0] = 20.0
    found = diffrate_search(model, data(), 0.9 * full(make()), **QUICK)
    assert found.prune_kept_num == [37, 37, 37]
    assert model.blocks[1].prune_ddp.selected_probability.shape == (9,)
    assert model.tokred_patch.method.granularity == 4


# --- what it leaves alone


def test_weights_gradients_modes_and_flags_stay():
    model = patch(make(), "diffrate").train()
    model.blocks[1].eval()
    model.head.weight.requires_grad_(False)
    model.blocks[2].merge_ddp.selected_probability.requires_grad_(False)
    model.blocks[1].mlp.fc1.weight.grad = torch.ones_like(model.blocks[1].mlp.fc1.weight)
    before = copy.deepcopy(model)
    found = diffrate_search(model, data(), 0.7 * full(make()), **{**QUICK, "steps": 20})
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    for (name, own), other in pairs:
        learned = "selected_probability" in name and "blocks.0." not in name
        assert torch.equal(own, other) != learned, name
        assert own.requires_grad == other.requires_grad, name
        assert (own.grad is None) == ("blocks.1.mlp.fc1.weight" not in name), name
    assert (model.blocks[1].mlp.fc1.weight.grad == 1).all()
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert isinstance(found, FoundRates)


def test_after_an_exception_all_is_as_before():
    target = 0.7 * full(make())

    def fails(outputs, labels):
        raise KeyboardInterrupt

    model = make()
    before, names = type(model), list(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        diffrate_search(model, data(), target, criterion=fails, **QUICK)
    assert type(model) is before
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    patch(model, "diffrate")
    with pytest.raises(KeyboardInterrupt):
        diffrate_search(model, data(), target, criterion=fails, **QUICK)
    assert type(model) is not before, "it was patched before"
    assert not any(m.training for m in model.modules())


# --- batches and progress


def test_batches_are_gone_through_as_often_as_it_takes():
    calls = []

    def fresh():
        calls.append(1)
        return iter(data(2))

    target = 0.7 * full(make())
    results = [diffrate_search(make_same(), batches, target, **{**QUICK, "steps": 5}) for batches in (fresh, data(2))]
    assert len(calls) == 3
    assert results[0] == results[1]
    with pytest.raises(ValueError, match="got no batches the second time; give a DataLoader"):
        diffrate_search(make(), iter(data(2)), target, **QUICK)
    with pytest.raises(ValueError, match=r"batches must give \(images, labels\), got none"):
        diffrate_search(make(), [], target, **QUICK)
    for batch in (torch.randn(2, 3, 48, 48), (torch.randn(2, 3, 48, 48),), (torch.randn(2, 3, 48, 48), [0, 1])):
        with pytest.raises(TypeError, match=r"must give \(images, labels\), got (Tensor|tuple) as batch 0"):
            diffrate_search(make(), [batch], target, **QUICK)


def make_same():
    torch.manual_seed(3)
    return make()


def test_progress_is_shown_or_not(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    target = 0.7 * full(make())
    diffrate_search(make(), data(), target, **QUICK)
    assert capsys.readouterr().err == ""
    diffrate_search(make(), data(), target, **{**QUICK, "progress": True})
    assert "search" in capsys.readouterr().err
    plain_import = builtins.__import__

    def without_tqdm(name, *rest, **more):
        if name == "tqdm":
            raise ImportError(name)
        return plain_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_tqdm)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    diffrate_search(make(), data(), target, **{**QUICK, "progress": True})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("search: batch 3 of 3, 0.00")


def test_runs_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        found = diffrate_search(make(), data(), 0.7 * full(make()), **QUICK)
    assert found.gflops > 0


# --- what is refused, and what is warned of


@pytest.mark.parametrize("share", [0.2, 1.01])
def test_a_target_out_of_reach_says_what_is_in_reach(share):
    model = make()
    least = flops.count(
        patch(make(), "diffrate", kept={"prune_kept_num": [37, 2, 2], "merge_kept_num": [37, 2, 2]})
    ).gflops
    message = rf"target_gflops must be from {least:.4g}, .* to {full(model):.4g}, with all of them, got"
    with pytest.raises(ValueError, match=message):
        diffrate_search(model, data(), share * full(model), **QUICK)
    assert "tokred_patch" not in vars(model)


def test_who_ends_off_the_target_hears_of_it():
    with pytest.warns(UserWarning, match="counts found take .* GFLOPs, and the target was"):
        diffrate_search(make(), data(), 0.95 * full(make()), steps=1, progress=False)


def test_what_is_no_number_is_refused():
    with pytest.raises(FloatingPointError, match="got a loss of nan in step 0"):
        diffrate_search(make(), data(), 0.7 * full(make()), criterion=lambda y, _: y.sum() * torch.nan, **QUICK)


@pytest.mark.parametrize(
    "settings,error,words",
    [
        ({"target_gflops": 0}, ValueError, "target_gflops must be finite and above 0, got 0"),
        ({"target_gflops": "3"}, TypeError, "target_gflops must be a number, got str"),
        ({"lr": float("inf")}, ValueError, "lr must be finite, got inf"),
        ({"flops_weight": -1.0}, ValueError, "flops_weight must be finite and 0 or above, got -1.0"),
        ({"tolerance": True}, TypeError, "tolerance must be a number, got bool"),
        ({"steps": 0}, ValueError, "diffrate_search: steps must be at least 1, got 0"),
        ({"steps": 1.0}, TypeError, "steps must be an int"),
        ({"granularity": 0}, ValueError, "granularity must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, error, words):
    with pytest.raises(error, match=words):
        diffrate_search(make(), data(), **{"target_gflops": 0.001, **settings})


def test_inference_mode_is_refused_and_the_model_left_alone():
    model = make()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"call it outside torch\.inference_mode"):
        diffrate_search(model, data(), 0.001)
    assert not any("prune_ddp" in name for name in model.state_dict())


def test_wrong_models_are_refused():
    with pytest.raises(ValueError, match=r'with "diffrate" and no counts given, got "tome"'):
        diffrate_search(patch(make(), "tome", r=3), data(), 0.001)
    fixed = patch(make(), "diffrate", kept={"prune_kept_num": [9] * 3, "merge_kept_num": [9] * 3})
    with pytest.raises(ValueError, match='no counts given, got "diffrate", kept='):
        diffrate_search(fixed, data(), 0.001)
    with pytest.raises(NotImplementedError, match="Linear is not supported"):
        diffrate_search(nn.Linear(2, 2), data(), 0.001)
    dropping = make(patch_drop_rate=0.5)
    with pytest.raises(NotImplementedError, match="patch dropout leaves fewer"):
        diffrate_search(dropping, data(), 0.7 * full(make()))


# --- together


def search_together(rank, folder):
    """Run in each process: a search on different images and from different counts, in DistributedDataParallel."""
    model = patch(make_same(), "diffrate")
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    with torch.no_grad():  # after DistributedDataParallel has made them equal
        model.blocks[1].prune_ddp.selected_probability[rank] += 1
    # In the first process half as many batches.
    batches = data(1 + rank, seed=rank)
    file = f"{folder}/found.json"
    found = diffrate_search(wrapped, batches, 0.7 * full(make()), steps=10, lr=0.03, save=file, **LOOSE)
    rates = [rate for block in model.blocks for rate in (block.prune_ddp, block.merge_ddp)]
    logits = [rate.selected_probability.detach() for rate in rates]
    stopped = False
    try:
        nan = [(images * (torch.nan if rank else 1), labels) for images, labels in batches]
        diffrate_search(model, nan, 0.7 * full(make()), group=torch.distributed.group.WORLD, **QUICK)
    except FloatingPointError:
        stopped = True
    return {"found": tuple(found), "logits": logits, "stopped": stopped}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    return run_together(search_together, folder), json.loads((folder / "found.json").read_text())


def test_processes_end_with_equal_counts(together):
    (first, second), saved = together
    assert first["found"] == second["found"]
    assert saved["prune_kept_num"] == first["found"][0]
    assert all(torch.equal(own, other) for own, other in zip(first["logits"], second["logits"], strict=True))


def test_all_stop_where_one_has_nan(together):
    results, _ = together
    assert all(one["stopped"] for one in results)
