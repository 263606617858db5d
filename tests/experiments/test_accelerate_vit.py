# SPDX-License-Identifier: MIT
"""The demo, with a tiny model and two small pictures."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
PIL = pytest.importorskip("PIL.Image")

TINY = ["--model", "test_vit", "--batch", "2", "--rounds", "1", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def demo(load_experiment):
    return load_experiment("accelerate_vit")


@pytest.fixture
def folder(tmp_path):
    """A wide and a tall grey picture, a broken one, and a file that is not a picture."""
    rng = np.random.default_rng(0)
    path = tmp_path / "pictures"
    path.mkdir()
    PIL.fromarray(rng.integers(0, 256, (90, 130, 3), dtype=np.uint8)).save(path / "one.png")
    PIL.fromarray(rng.integers(0, 256, (150, 70), dtype=np.uint8)).save(path / "two.JPG")
    (path / "broken.png").write_bytes(b"no picture at all")
    (path / "notes.txt").write_text("no picture either")
    return path


def test_the_whole_run(demo, folder, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    demo.main([*TINY, "--random-weights", "--images", str(folder), "--r", "16", "0", "--out", str(out)])
    printed, warned = capsys.readouterr()
    assert "test_vit, 2 photographs, batch 2, CPU" in printed
    assert "With random weights" in printed
    assert "skipped broken.png" in warned
    assert "notes.txt" not in warned

    figures = json.loads((out / "figures.json").read_text())
    unpatched, same, merged = figures["rows"]
    assert [row["setting"] for row in figures["rows"]] == ["unpatched", "r = 0", "r = 16"]
    assert unpatched["tokens"] == same["tokens"] == 101
    assert merged["tokens"] < 20
    assert unpatched["relative_l2"] == same["relative_l2"] == 0
    assert merged["relative_l2"] > 0
    assert merged["cosine"] < 1
    assert unpatched["gflops"] == same["gflops"] > 1.5 * merged["gflops"]
    assert all(row["images_per_s"] > 0 and row["speedup"] > 0 for row in figures["rows"])
    assert unpatched["speedup"] == 1

    strips = [np.asarray(PIL.open(out / f"tokens-{name}.png")) for name in ("one", "two")]
    assert len({strip.shape for strip in strips}) == 1
    assert np.asarray(PIL.open(out / "tokens.png")).shape[0] == 2 * strips[0].shape[0]
    width = strips[0].shape[1]
    assert width == 2 * 448 + 3 * 12  # the photograph and r = 16; r = 0 would show all patches
    assert len(np.unique(strips[0].reshape(-1, 3), axis=0)) > 100
    assert PIL.open(out / "speed.png").size[0] > 500


def test_the_whole_run_with_algm(demo, folder, tmp_path, capsys):
    PIL.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(folder / "plain.png")
    demo.main([*TINY, "--random-weights", "--images", str(folder), "--method", "algm", "--out", str(tmp_path)])
    assert "test_vit, 3 photographs, batch 2, CPU" in capsys.readouterr().out

    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    merged = rows[1:]
    values = [row["value"] for row in merged]
    assert values == sorted(values, reverse=True)
    assert [row["setting"] for row in merged] == [f"threshold {value:g}" for value in values]
    tokens = [row["tokens"] for row in rows]
    assert tokens[0] == 101
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[-1] < 60
    gflops = [row["gflops"] for row in rows]
    assert gflops == sorted(gflops, reverse=True)
    assert all(row["relative_l2"] > 0 for row in merged)
    strip = PIL.open(tmp_path / "tokens-plain.png")
    assert strip.size[0] == (1 + len(merged)) * 448 + (2 + len(merged)) * 12


def test_thresholds_layers_and_counts_have_an_effect(demo, folder, tmp_path):
    arguments = [*TINY, "--random-weights", "--images", str(folder), "--method", "algm", "--out", str(tmp_path)]
    demo.main([*arguments, "--threshold", "-1", "2", "--layers", "1", "--count", "batch"])
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["setting"] for row in rows] == ["unpatched", "threshold 2", "threshold -1"]
    assert [row["tokens"] for row in rows] == [101, 101, 26]
    assert rows[1]["relative_l2"] == 0


def test_window_cosines_by_hand(demo):
    x = torch.nn.functional.normalize(torch.randn(2, 4 * 6, 8), dim=-1)
    found = demo.window_cosines(x, (4, 6)).view(2, 2, 3)
    for image, row, column in ((0, 0, 0), (1, 1, 2)):
        members = x[image].view(4, 6, 8)[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(4, 8)
        pairs = members @ members.T
        assert found[image, row, column] == pytest.approx(float((pairs.sum() - pairs.trace()) / 12), abs=1e-5)


def test_more_pictures_than_a_batch(demo, folder, tmp_path):
    for number in range(3):
        PIL.fromarray(np.full((40, 40, 3), 60 * number, np.uint8)).save(folder / f"plain{number}.png")
    demo.main([*TINY, "--random-weights", "--images", str(folder), "--r", "8", "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("tokens-*.png"))) == 5


def test_missing_weights_give_a_notice(demo, folder, tmp_path, capsys, monkeypatch):
    timm = demo.import_with_torchvision("timm")
    real = timm.create_model

    def offline(name, pretrained=False, **settings):
        if pretrained:
            raise OSError("We couldn't connect\nand so on")
        return real(name, **settings)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(demo, "_hub_answers", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    demo.main([*TINY, "--images", str(folder), "--r", "8", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Notice: random weights, because loading pretrained ones failed (We couldn't connect)"


def test_pictures_of_more_than_eight_bits(demo, tmp_path, capsys):
    ramp = np.linspace(0, 65535, 256 * 64).astype(np.uint16).reshape(64, 256)
    PIL.fromarray(ramp).save(tmp_path / "grey.png")
    PIL.fromarray(ramp.astype(np.float32)).save(tmp_path / "floats.tif")
    (picture,) = demo.photos.load(tmp_path).values()
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), np.repeat((ramp // 257)[..., None], 3, 2))
    assert "skipped floats.tif, which cannot be read: mode 'F'" in capsys.readouterr().err


def test_default_photographs(demo):
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    pictures = demo.photos.load(None)
    assert {"china", "flower", "astronaut", "chelsea", "coffee"} <= set(pictures)
    assert all(picture.mode == "RGB" and min(picture.size) >= 300 for picture in pictures.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "EMPTY"], "it has no readable picture"),
        (["--images", "/does/not/exist"], "the folder does not exist"),
        (["--model", "test_vitt"], "timm has no such model; did you mean test_vit"),
        (["--model", "resnet18"], "ResNet is not supported; supported are timm's VisionTransformer"),
        (["--out", "TAKEN"], "cannot write there"),
        (["--device", "abacus"], "--device abacus: torch cannot use it here"),
        (["--method", "algm", "--layers", "99"], "layers must be from 0 to 5, the model's last block, got 99"),
        (["--method", "algm", "--layers", "3", "1"], r"layers must ascend, got \(3, 1\)"),
    ],
)
def test_bad_arguments(demo, folder, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": str(tmp_path / "empty"), "TAKEN": str(folder / "notes.txt")}
    arguments = [places.get(argument, argument) for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        demo.main([*TINY, "--random-weights", "--images", str(folder), "--out", str(tmp_path), *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--r", "-1"], "a whole number of 0 or more, got '-1'"),
        (["--r", "2.5"], "a whole number of 0 or more, got '2.5'"),
        (["--batch", "0"], "a whole number of 1 or more, got '0'"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--method", "algm", "--threshold", "nan"], "must be a number, got 'nan'"),
        (["--method", "algm", "--threshold", "high"], "must be a number, got 'high'"),
        (["--method", "algm", "--layers", "-1"], "a whole number of 0 or more, got '-1'"),
        (["--method", "algm", "--count", "all"], "invalid choice: 'all'"),
        (["--method", "algm", "--r", "4"], "--r needs --method tome, got --method algm"),
        (["--threshold", "0.9"], "--threshold needs --method algm, got --method tome"),
        (["--layers", "1"], "--layers needs --method algm, got --method tome"),
    ],
)
def test_arguments_that_cannot_be_parsed(demo, capsys, arguments, message):
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert message in capsys.readouterr().err


def test_a_patch_needs_no_more_memory(demo):
    model = demo.import_with_torchvision("timm").create_model("test_vit").eval().requires_grad_(False)
    x = torch.zeros(2, 3, 160, 160)

    def peak():
        return demo.peak_bytes(lambda: model(x), "cpu")

    unpatched = peak()
    for arguments, value in (([], 0), ([], 16), (["--method", "algm"], 2.0), (["--method", "algm"], -1.0)):
        with demo.patched(model, demo.parse(arguments), value):
            # Packing copies the tokens if nothing merges.
            assert peak() <= unpatched * (1.1 if "algm" in arguments else 1)
