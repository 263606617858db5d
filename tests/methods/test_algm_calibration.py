# SPDX-License-Identifier: MIT
"""Thresholds from data, against a plain list of every cosine."""

import json
import sys

import pytest
import torch
import torch.utils.flop_counter
from processes import run_together

from tokred_kernels.methods.algm import Similarity, Thresholds, calibrate_thresholds, calibration
from tokred_kernels.methods.algm.calibration import pair_sums
from tokred_kernels.models.imports import import_timm
from tokred_kernels.patching import patch

timm = import_timm()


def make(**settings):
    settings = {"img_size": 48, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, **settings}
    return timm.models.vision_transformer.VisionTransformer(num_classes=0, **settings)


def cosines(groups):
    """All cosines of pairs of different tokens in a group, one by one, in float64."""
    found = []
    for tokens in groups.double():
        for i in range(len(tokens)):
            for j in range(i):
                scale = tokens[i].norm() * tokens[j].norm()
                found.append(float(tokens[i] @ tokens[j] / scale) if scale else 0.0)
    return torch.tensor(found, dtype=torch.float64)


def seen(model, batches):
    """What enters norm2 of each block, prefix left out: for each layer a list of (B, N, C)."""
    inputs = [[] for _ in model.blocks]
    handles = [
        block.norm2.register_forward_pre_hook(
            lambda _, args, own=own: own.append(args[0][:, model.num_prefix_tokens :].clone())
        )
        for block, own in zip(model.blocks, inputs, strict=True)
    ]
    with torch.no_grad():
        for batch in batches:
            model.forward_features(batch)
    for handle in handles:
        handle.remove()
    return inputs


def assert_describes(similarity, values):
    assert similarity.pairs == len(values)
    assert similarity.mean == pytest.approx(values.mean().item(), abs=1e-12)
    assert similarity.std == pytest.approx(values.std(correction=0).item(), abs=1e-9)


# More tokens than channels and fewer, one token, none; groups that take several steps, Gram rows in several blocks.
@pytest.mark.parametrize("shape", [(2, 9, 4), (3, 4, 9), (1, 2, 1), (5, 1, 3), (0, 4, 3), (7, 6, 5)])
@pytest.mark.parametrize("numbers", [1, 10**6])
def test_sums_are_those_of_the_list(shape, numbers, monkeypatch):
    monkeypatch.setattr(calibration, "BLOCK_NUMBERS", numbers)
    monkeypatch.setattr(calibration, "BLOCK_ROWS", 2)
    x = torch.randn(shape)
    values = cosines(x)
    wanted = torch.tensor([len(values), values.sum(), values.square().sum()], dtype=torch.float64)
    torch.testing.assert_close(pair_sums(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 200, 8), (3, 8, 200)])
def test_the_smaller_gram_matrix_is_made(shape):
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        pair_sums(torch.randn(shape))
    assert counter.get_total_flops() == 2 * 3 * 200 * 8 * 8


def test_a_zero_token_is_like_no_other():
    x = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]])
    assert pair_sums(x).tolist() == [3, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_precision_tokens_do_not_overflow(dtype):
    x = torch.randn(2, 8, 16, dtype=dtype) * 10000
    values = cosines(x)
    torch.testing.assert_close(pair_sums(x)[1], values.sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}])
def test_each_layer_is_that_of_the_list(settings):
    model = make(**settings).eval()
    batches = [torch.randn(2, 3, 48, 48), torch.randn(1, 3, 48, 48)]
    thresholds = calibrate_thresholds(model, batches, progress=False)
    assert list(thresholds.layers) == [0, 1, 2]
    assert thresholds.window is None
    for layer, tokens in enumerate(seen(model, batches)):
        similarity = thresholds.layers[layer]
        assert_describes(similarity, torch.cat([cosines(part) for part in tokens]))
        assert thresholds.threshold(layer) == similarity.mean + similarity.std
        assert similarity.pairs == 3 * 36 * 35 // 2


def test_windows_on_a_grid_that_they_do_not_divide():
    model = make(img_size=(40, 56)).eval()  # a grid of 5 x 7
    images = torch.randn(2, 3, 40, 56)
    thresholds = calibrate_thresholds(model, [images], layers=(1,), window=(2, 3), progress=False)
    grid = seen(model, [images])[1][0].view(2, 5, 7, -1)
    windows = [
        grid[image, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3].reshape(6, -1)
        for image in range(2)
        for row in range(2)
        for column in range(2)
    ]
    assert list(thresholds.layers) == [1]
    assert thresholds.window == (2, 3)
    assert_describes(thresholds.layers[1], cosines(torch.stack(windows)))


def test_images_of_several_sizes_with_labels():
    model = make(dynamic_img_size=True).eval()
    images = [torch.randn(1, 3, 48, 48), torch.randn(2, 3, 32, 64)]
    thresholds = calibrate_thresholds(
        model, ([x, torch.zeros(len(x))] for x in images), layers=[2], window=(2, 2), progress=False
    )
    assert thresholds.layers[2].pairs == (9 + 2 * 8) * 6


def test_equal_tokens_spread_by_nothing():
    model = make(pos_embed="none", class_token=False, global_pool="avg")
    found = calibrate_thresholds(model, [torch.ones(1, 3, 48, 48)], layers=(0,), progress=False).layers[0]
    assert found.mean == pytest.approx(1, abs=1e-12)
    assert found.std == pytest.approx(0, abs=1e-6)


def test_the_model_is_left_as_it_was():
    model = make(pos_drop_rate=0.5, patch_drop_rate=0.5).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    images = torch.randn(2, 3, 48, 48)
    first = calibrate_thresholds(model, [images], progress=False)
    assert first == calibrate_thresholds(model, [images], progress=False)  # in eval mode nothing is dropped
    assert first.layers[1].pairs == 2 * 36 * 35 // 2
    assert [module.training for module in model.modules()] == modes
    assert not hasattr(model, "tokred_patch") and type(model) is type(make())


def test_nothing_is_left_in_the_model_after_an_exception():
    def broken():
        yield torch.randn(1, 3, 48, 48)
        raise OSError("the disk is full")

    model = make().train()
    classes = [type(part) for part in model.modules()]
    with pytest.raises(OSError, match="the disk is full"):
        calibrate_thresholds(model, broken(), progress=False)
    assert not hasattr(model, "tokred_patch") and [type(part) for part in model.modules()] == classes
    assert model.training and model.blocks[0].training


@pytest.mark.parametrize(
    ("batches", "settings", "error", "message"),
    [
        ([], {}, ValueError, "batches must give an image of two tokens or more, got no pair"),
        (["image"], {}, TypeError, "batches must give images .* got str as batch 0"),
        ([()], {}, TypeError, "got tuple as batch 0"),
        ([torch.zeros(3, 48, 48)], {}, ValueError, r"got shape \(3, 48, 48\) as batch 0"),
        (None, {"layers": (0, 3)}, ValueError, "layers must be at most 2, the last block, got 3"),
        (None, {"layers": (-1,)}, ValueError, "layers must be at least 0, got -1"),
        (None, {"layers": ()}, TypeError, r"layers must be a sequence of ints, counted from 0, got \(\)"),
        (None, {"layers": 1}, TypeError, "layers must be a sequence of ints"),
        (None, {"layers": (1.0,)}, TypeError, "layers must be an int, got float"),
        (None, {"window": 2}, TypeError, "window must be a pair"),
        (None, {"window": (1, 1)}, ValueError, r"window must hold at least 2 tokens, got \(1, 1\)"),
        (None, {"window": (7, 2)}, ValueError, r"window must fit into the grid \(6, 6\), got \(7, 2\)"),
    ],
)
def test_refusals(batches, settings, error, message):
    batches = [torch.zeros(1, 3, 48, 48)] if batches is None else batches
    with pytest.raises(error, match=message):
        calibrate_thresholds(make(), batches, progress=False, **settings)


def test_a_single_token_makes_no_pair():
    with pytest.raises(ValueError, match="got no pair of tokens"):
        calibrate_thresholds(make(img_size=8), [torch.zeros(1, 3, 8, 8)], progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tokens_that_are_no_numbers(value):
    images = torch.randn(2, 3, 48, 48)
    images[1, 0, 0, 0] = value
    with pytest.raises(ValueError, match="tokens of every layer must be finite, got NaN or infinity in layer 0, 1, 2"):
        calibrate_thresholds(make(), [images], progress=False)


def test_wrong_models():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        calibrate_thresholds("vit", [])
    with pytest.raises(NotImplementedError, match=r"Sequential is not supported.*give the VisionTransformer inside"):
        calibrate_thresholds(torch.nn.Sequential(make()), [])
    with pytest.raises(NotImplementedError, match=r"blocks\.0 of this VisionTransformer is a .*ParallelScalingBlock"):
        calibrate_thresholds(make(block_fn=timm.models.vision_transformer.ParallelScalingBlock), [])
    with pytest.raises(ValueError, match=r'model must not be patched \("tome", r=2.*unpatch\(model\) first'):
        calibrate_thresholds(patch(make(), "tome", r=2), [])


KNOWN = Thresholds({1: Similarity(0.1 + 0.2, 1 / 3, 523776), 12: Similarity(-1e-17, 0.0, 1)}, (2, 2))


@pytest.mark.parametrize("thresholds", [KNOWN, Thresholds(KNOWN.layers)])
def test_a_file_gives_the_same_numbers_back(thresholds, tmp_path):
    thresholds.save(tmp_path / "thresholds.json")
    assert Thresholds.load(tmp_path / "thresholds.json") == thresholds
    assert Thresholds.load(str(tmp_path / "thresholds.json")).threshold(1) == 0.1 + 0.2 + 1 / 3


ENTRY = {"mean": 0.5, "std": 0.25, "pairs": 6}


def edited(**changes):
    content = {"version": 2, "window": None, "layers": {"1": ENTRY}}
    return json.dumps({**content, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("[1]", "version must be 2, which counts layers from 0, got None"),
        (edited(version=1), "version must be 2, which counts layers from 0, got 1; calibrate again"),
        (edited(layers={}), "layers must have at least one layer, got none"),
        (edited(layers=[1]), r"layers must be an object, got \[1\]"),
        (edited(window=[2]), r"window must be two ints or null, got \(2,\)"),
        (edited(window="2x2"), "window must be two ints or null, got '2x2'"),
        (edited(window=[2, 0]), "window must be an int from 1 to .*, got 0"),
        (edited(layers={"-1": {}}), "layers must be named by numbers from 0, got '-1'"),
        (edited(layers={"one": {}}), "layers must be named by numbers from 0, got 'one'"),
        (edited(layers={"01": {}}), "layers must be named by numbers from 0, got '01'"),
        (edited(layers={"1" * 9999: {}}), "layers must be named by numbers from 0, got '111"),
        (edited(layers={"12": ENTRY, "3": ENTRY}), "layers must ascend, got 3 after 12"),
        (edited()[:-2] + ', "1": {}}}', "must be JSON .'1' is there twice"),
        (edited(layers={"1": {"mean": 0.5}}), "layer 1 must have mean, std, pairs; missing: std, pairs"),
        (edited(layers={"1": 0.88}), "layer 1 must be an object with mean, std, pairs, got 0.88"),
        (edited(layers={"1": ENTRY | {"mean": float("nan")}}), "layer 1: mean must be a number from .*, got nan"),
        (edited(layers={"1": ENTRY | {"std": -0.1}}), "layer 1: std must be a number from 0 to .*, got -0.1"),
        (edited(layers={"1": ENTRY | {"pairs": 3.5}}), "layer 1: pairs must be an int from 1 to .*, got 3.5"),
        (edited(layers={"1": ENTRY | {"mean": True}}), "layer 1: mean must be a number from .*, got True"),
    ],
    ids=lambda text: text[:60],
)
def test_broken_files(text, message, tmp_path):
    path = tmp_path / "thresholds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Thresholds.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [float("nan"), float("inf"), 10**400, -2.0, "1", None], ids=lambda wrong: str(wrong)[:9]
)
def test_wrong_numbers_are_neither_constructed_nor_saved(wrong, tmp_path):
    (tmp_path / "thresholds.json").write_text("old")
    for name in Similarity._fields:
        layers = {1: KNOWN.layers[1]._replace(**{name: wrong})}
        with pytest.raises(ValueError, match=rf"tokred_kernels\.Thresholds: layer 1: {name} must be"):
            Thresholds(layers)
        thresholds = Thresholds({1: KNOWN.layers[1]})
        thresholds.layers.update(layers)
        with pytest.raises(ValueError, match=f"layer 1: {name} must be"):
            thresholds.save(tmp_path / "thresholds.json")
    assert (tmp_path / "thresholds.json").read_text() == "old"


@pytest.mark.parametrize(
    ("layers", "window", "error", "message"),
    [
        ([KNOWN.layers[1]], None, TypeError, "layers must be a dict of Similarity"),
        ({1: (0.5, 0.25, 6)}, None, TypeError, "layers must be a dict of Similarity"),
        ({}, None, ValueError, "layers must have at least one layer, got none"),
        ({-1: KNOWN.layers[1]}, None, ValueError, "a layer must be an int from 0 to .*, got -1"),
        ({2: KNOWN.layers[1], 1: KNOWN.layers[1]}, None, ValueError, "layers must ascend, got 1 after 2"),
        (KNOWN.layers, 2, ValueError, "window must be two ints or null, got 2"),
        (KNOWN.layers, (2, -1), ValueError, "window must be an int from 1 to .*, got -1"),
    ],
)
def test_wrong_layers_and_windows_are_refused(layers, window, error, message):
    with pytest.raises(error, match=rf"tokred_kernels\.Thresholds: {message}"):
        Thresholds(layers, window)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        Thresholds.load(tmp_path / "nothing.json")


def test_a_file_that_was_written_by_hand_is_enough(tmp_path):
    (tmp_path / "thresholds.json").write_text(edited())
    assert Thresholds.load(tmp_path / "thresholds.json").threshold(1) == 0.75


def test_thresholds_are_readable():
    assert repr(KNOWN).splitlines() == [
        "Thresholds(layer: mean + std of the cosines of pairs in windows of 2 x 2",
        "  1: 0.6333 = 0.3000 + 0.3333 over 523,776 pairs",
        "  12: -0.0000 = -0.0000 + 0.0000 over 1 pairs)",
    ]
    with pytest.raises(ValueError, match="layer must be one of 1, 12, got 5"):
        KNOWN.threshold(5)
    with pytest.raises(AttributeError):
        KNOWN.window = None


def test_progress_is_shown_with_tqdm_and_without(monkeypatch, capsys):
    images = [torch.zeros(1, 3, 48, 48)] * 2
    calibrate_thresholds(make(), images, progress=False)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(calibration, "LINE_SECONDS", 0.0)
    monkeypatch.setitem(sys.modules, "tqdm", None)  # an import of it fails
    calibrate_thresholds(make(), images)
    assert capsys.readouterr() == ("", "calibrate: batch 1 of 2\ncalibrate: batch 2 of 2\n")
    calibrate_thresholds(make(), iter(images))
    assert capsys.readouterr().err == "calibrate: batch 1\ncalibrate: batch 2\n"
    monkeypatch.delitem(sys.modules, "tqdm")
    pytest.importorskip("tqdm")
    calibrate_thresholds(make(), images)
    assert "calibrate:" in capsys.readouterr().err


def calibrate_together(rank, folder):
    """Run in each process: thresholds of every other batch, then of NaN, which process 0 alone has."""
    batches = torch.load(f"{folder}/batches.pt")
    torch.manual_seed(0)
    group = torch.distributed.group.WORLD
    calibrate_thresholds(make(), batches[rank::2], group=group, progress=False).save(f"{folder}/{rank}.json")
    batches[0][:] = torch.nan
    try:
        calibrate_thresholds(make(), batches[rank::2], group=group, progress=False)
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    batches = [torch.randn(number, 3, 48, 48) for number in (2, 1, 3)]
    torch.save(batches, tmp_path / "batches.pt")
    errors = run_together(calibrate_together, tmp_path)
    torch.manual_seed(0)
    alone = calibrate_thresholds(make(), batches, progress=False)
    both = [Thresholds.load(tmp_path / f"{rank}.json") for rank in range(2)]
    assert both[0] == both[1]
    for layer, similarity in alone.layers.items():
        assert both[0].layers[layer] == pytest.approx(similarity, abs=1e-9)
    assert all("tokens of every layer must be finite" in error for error in errors)
