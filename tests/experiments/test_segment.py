# SPDX-License-Identifier: MIT
"""The segmentation experiment, with tiny models and small pictures."""

import json
import sys

import numpy as np
import pytest
import torch

from tokred_kernels.methods.algm import Similarity

pytest.importorskip("tqdm")
PIL = pytest.importorskip("PIL.Image")

SMALL = ["--quick", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def demo(load_experiment):
    module = load_experiment("segment")
    module.masks = sys.modules["masks"]
    return module


@pytest.fixture
def folders(tmp_path):
    """A wide and a tall picture of two colours, and their masks with the classes 0 and 2."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for name, shape in (("wide", (80, 160)), ("tall", (150, 70))):
        cells = rng.integers(0, 2, (10, 10))
        mask = cells[np.arange(shape[0])[:, None] // 16, np.arange(shape[1])[None] // 16]
        picture = np.array([[200, 40, 40], [30, 90, 220]])[mask] + rng.integers(-20, 20, (*shape, 3))
        PIL.fromarray(picture.astype(np.uint8)).save(tmp_path / "images" / f"{name}.png")
        PIL.fromarray((2 * mask).astype(np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    return ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]


def test_the_whole_run(demo, folders, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    demo.main([*SMALL, *folders, "--steps", "40", "--threshold", "0.9", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "2 pictures, 3 classes, 64 px, CPU" in printed
    assert "Windows merge if their mean cosine is at least 0.9000." in printed
    assert "trained with ALGM" in printed

    report = json.loads((out / "segment.json").read_text())
    plain, put_in, trained = report["rows"]
    assert [row["setting"] for row in report["rows"]] == ["plain", "ALGM put in", "trained with ALGM"]
    assert plain["tokens"] == [64, 64]
    assert plain["speedup"] == 1
    assert plain["miou"] > 70
    for row in (put_in, trained):
        assert max(row["tokens"]) <= 48
        assert row["gflops"] < plain["gflops"]
        assert row["images_per_s"] > 0
        assert len(row["iou"]) == 2  # class 1 does not occur
    assert abs(put_in["miou"] - plain["miou"]) < 5
    assert report["threshold"] == 0.9
    assert demo.tk.Thresholds.load(out / "thresholds.json").layers.keys() == {0, 1}

    strips = [np.asarray(PIL.open(out / f"segment-{name}.png")) for name in ("wide", "tall")]
    sheet = np.asarray(PIL.open(out / "segment.png"))
    assert sheet.shape == (2 * strips[0].shape[0], *strips[0].shape[1:])
    assert strips[0].shape[1] == 7 * (demo.PICTURE + 12) + 12


def test_runs_are_equal(demo, folders):
    options = demo.parse([*SMALL, *folders])
    data = demo.load(options, torch.device("cpu"))
    first, second = (
        demo.train(*demo.begin(data, options, torch.device("cpu")), data, options, range(2), "training")
        for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


def test_every_step_has_different_crops(demo, folders, monkeypatch):
    options = demo.parse([*SMALL, *folders, "--steps", "5"])
    data = demo.load(options, torch.device("cpu"))
    asked, real = [], demo.crops
    monkeypatch.setattr(
        demo, "crops", lambda data, options, number: asked.append(number) or real(data, options, number)
    )
    begun = demo.begin(data, options, torch.device("cpu"))
    demo.calibrate(demo.train(*begun, data, options, range(2, 5), "training"), data, options)
    assert asked == [2, 3, 4, 5, 6, 7, 8]  # calibration has its own crops


def test_a_copy_trains_in_the_same_way(demo, folders):
    options = demo.parse([*SMALL, *folders, "--steps", "4"])
    data = demo.load(options, torch.device("cpu"))
    begun = demo.begin(data, options, torch.device("cpu"))
    demo.train(*begun, data, options, range(2), "training")
    both = (begun, demo.copy.deepcopy(begun))
    first, second = (demo.train(*one, data, options, range(2, 4), "training") for one in both)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    demo.train(*both[1], data, options, range(3, 4), "training")
    assert not torch.equal(first.decoder.head.weight, second.decoder.head.weight)  # an independent copy


@pytest.mark.parametrize("size", [(60, 100), (100, 60), (64, 64)])
def test_test_crops_are_held_out(demo, size):
    height, width = size
    place = torch.arange(height * width, dtype=torch.float32).view(1, height, width)
    options = demo.parse(["--size", "40", "--crop", "24"])
    seen, kept = demo.masks.split("x", place, options)
    assert kept.shape == (1, 40, 40)
    assert set(seen.flatten().tolist()).isdisjoint(kept.flatten().tolist())
    assert min(seen.shape[1:]) >= 24
    assert torch.equal(kept[0, 0].diff(), torch.ones(39))  # in the order of the picture


@pytest.mark.parametrize("size", [(60, 63), (39, 100), (63, 60)])
def test_pictures_that_are_too_small(demo, size):
    options = demo.parse(["--size", "40", "--crop", "24"])
    with pytest.raises(
        SystemExit,
        match=f"mine: a test crop of 40 .* do not fit into {size[1]} x {size[0]}",
    ):
        demo.masks.split("mine", torch.zeros(1, *size), options)


def test_crops_and_masks_stay_together(demo):
    place = torch.arange(1200).view(30, 40)
    data = demo.Data([(place[None].expand(3, 30, 40).float(), place)], None, None, [], 2)
    options = demo.parse(["--crop", "16", "--batch", "20"])
    images, truth = demo.crops(data, options, 0)
    assert not torch.equal(truth, demo.crops(data, options, 1)[1])
    assert images.shape == (20, 3, 16, 16)
    assert torch.equal(images[:, 0].long(), truth)
    steps = truth[:, 0].diff().flatten().tolist()
    assert set(steps) == {1, -1}  # some are mirrored
    assert len(truth[:, 0, 0].unique()) > 10


class Fixed(torch.nn.Module):
    """A segmenter with fixed outputs."""

    def __init__(self, demo, data, options, found):
        super().__init__()
        real, _ = demo.begin(data, options, torch.device("cpu"))
        self.encoder, self.decoder, self.found = real.encoder, real.decoder, found

    def forward(self, images):
        self.encoder.forward_features(images)
        return torch.nn.functional.one_hot(self.found[: len(images)], 3).movedim(-1, 1).float()


def test_scores(demo):
    options = demo.parse(SMALL)
    options.size = 8
    truth = torch.zeros(1, 8, 8, dtype=torch.long)
    truth[:, :, 4:] = 1
    truth[:, 0] = demo.masks.IGNORE
    data = demo.Data([], torch.zeros(1, 3, 8, 8), truth, ["x"], 3)
    found = truth.clone()
    found[:, 0] = 2  # pixels without a class do not count
    row = demo.evaluate("x", Fixed(demo, data, options, found), data, options)
    assert row["miou"] == row["accuracy"] == 100
    assert row["iou"] == [100, 100]
    found[:, :, 3] = 1  # 7 of the 28 pixels of class 0
    row = demo.evaluate("x", Fixed(demo, data, options, found), data, options)
    assert row["iou"] == pytest.approx([75, 80])
    assert row["miou"] == pytest.approx(77.5)
    assert row["accuracy"] == pytest.approx(87.5)
    found[:, 7] = 2  # a class that is predicted but does not occur
    assert demo.evaluate("x", Fixed(demo, data, options, found), data, options)["iou"][2] == 0


def test_pixels_without_a_class_have_no_gradient(demo):
    options = demo.parse(SMALL)
    picture, mask = torch.rand(3, 64, 64), torch.full((64, 64), demo.masks.IGNORE)
    data = demo.Data([(picture, mask)], None, None, [], 2)
    begun = demo.begin(data, options, torch.device("cpu"))
    demo.train(*begun, data, options, range(3), "training")
    assert not begun[0].decoder.head.bias.any()
    mask[:, :32] = 1
    assert (demo.train(*begun, data, options, range(2), "training").decoder.head.bias[1] > 0).all()


@pytest.mark.parametrize("count", ["batch", "image"])
def test_tokens_and_operations_are_those_of_the_images(demo, count):
    options = demo.parse([*SMALL, "--depth", "2", "--layers", "0"])
    images = torch.randn(3, 3, 64, 64)  # a batch of two, and one of one
    images[1] = 0  # all its windows merge
    data = demo.Data([], images, torch.zeros(3, 64, 64, dtype=torch.long), ["x", "y", "z"], 2)
    segmenter, _ = demo.begin(data, options, torch.device("cpu"))
    demo.tk.patch(segmenter.encoder, "algm", layers=(0,), threshold=0.999, count=count)
    row = demo.evaluate("x", segmenter, data, options)
    assert row["tokens"] == ([64, 16, 64] if count == "image" else [64, 64, 64])
    channels, classes, left = 64, 2, row["tokens"]
    first = [64 * 8 * channels**2 + 4 * 64**2 * channels + kept * 16 * channels**2 for kept in left]
    second = [kept * 24 * channels**2 + 4 * kept**2 * channels for kept in left]
    embedding = 64 * 2 * 3 * 64 * channels
    every = embedding + sum(first + second) / 3 + sum(left) / 3 * 2 * channels * classes
    assert row["gflops"] == pytest.approx(every / 1e9, rel=1e-6)


def test_the_calibrated_threshold_is_that_of_the_first_layer(demo):
    calibrated = demo.tk.Thresholds({0: Similarity(0.5, 0.25, 10), 4: Similarity(0.5, 0.125, 10)})
    assert demo.algm(demo.parse(["--threshold", "calibrated"]), calibrated)["threshold"] == 0.75
    assert demo.algm(demo.parse(["--threshold", "0.5"]), calibrated)["threshold"] == 0.5


def test_derived_masks_follow_the_colours(demo):
    rng = np.random.default_rng(0)
    left = np.full((90, 120, 3), (200, 40, 40)) + rng.integers(-5, 5, (90, 120, 3))
    left[:, 60:] = (30, 90, 220)
    other = np.full((70, 80, 3), (30, 90, 220))
    pictures = {"one": PIL.fromarray(left.astype(np.uint8)), "two": PIL.fromarray(other.astype(np.uint8))}
    derived = demo.masks.derive(pictures, 2)
    assert derived["one"].shape == (90, 120)
    red, blue = derived["one"][:, :48].unique(), derived["one"][:, 72:].unique()
    assert len(red) == len(blue) == 1 and red != blue
    assert derived["two"].unique() == blue  # the same class in all pictures
    again = demo.masks.derive(pictures, 2)
    assert all(torch.equal(derived[name], again[name]) for name in pictures)


def test_texture_separates_classes(demo):
    rng = np.random.default_rng(0)
    picture = np.full((100, 160), 128)
    picture[:, 80:] += rng.integers(-60, 61, (100, 80))  # the same mean brightness
    derived = demo.masks.derive({"x": PIL.fromarray(picture.astype(np.uint8)).convert("RGB")}, 2)["x"]
    smooth, rough = derived[:, :64].unique(), derived[:, 96:].unique()
    assert len(smooth) == len(rough) == 1 and smooth != rough


def test_colours_are_cie_lab(demo):
    from skimage.color import rgb2lab

    color = np.array([[[180, 30, 90]]], np.uint8)
    found = demo.masks._features(PIL.fromarray(color.repeat(9, 0).repeat(9, 1)))[:, 4, 4]
    np.testing.assert_allclose(found[:3], rgb2lab(color)[0, 0], atol=0.05)
    assert found[3].abs() < 0.1


def test_default_photographs(demo):
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    options = demo.parse([])
    for name, picture in demo.masks.photos.load(None).items():
        demo.masks.split(name, torch.zeros(1, picture.height, picture.width), options)


BROKEN = {
    "missing": (lambda path: path.unlink(), r"wide\.png: the mask does not exist"),
    "no picture": (lambda path: path.write_bytes(b"no picture"), r"wide\.png: the mask cannot be read"),
    "size": (
        lambda path: save(path, (80, 159)),
        r"wide\.png: expected the picture's 160 x 80, got 159 x 80",
    ),
    "colours": (lambda path: save(path, (80, 160, 3)), r"wide\.png: expected one channel of class ids"),
    "bits": (lambda path: save(path, (80, 160), bool), r"wide\.png: expected one channel .* bool"),
    "large": (lambda path: save(path, (80, 160), np.uint16, 256), r"wide\.png: class ids must be 0 to 254.* got 256"),
}


def save(path, shape, dtype=np.uint8, value=1):
    PIL.fromarray(np.full(shape, value, dtype)).save(path)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_masks(demo, folders, tmp_path, case):
    damage, message = BROKEN[case]
    damage(tmp_path / "masks" / "wide.png")
    with pytest.raises(SystemExit, match=message):
        demo.main([*SMALL, *folders, "--out", str(tmp_path / "out")])


def test_one_class_is_not_enough(demo, folders, tmp_path):
    save(tmp_path / "masks" / "wide.png", (80, 160), value=0)
    save(tmp_path / "masks" / "tall.png", (150, 70), value=255)
    with pytest.raises(SystemExit, match="expected at least two classes, but the largest class id is 0"):
        demo.main([*SMALL, *folders, "--out", str(tmp_path / "out")])


def test_masks_with_a_palette_hold_class_ids(demo, tmp_path):
    picture = PIL.fromarray(np.array([[0, 3], [255, 1]], np.uint8)).convert("L")
    picture.putpalette([7 * part % 256 for part in range(768)])
    picture.save(tmp_path / "x.png")
    found, classes = demo.masks.read(tmp_path, {"x": PIL.new("RGB", (2, 2))})
    assert found["x"].tolist() == [[0, 3], [255, 1]]
    assert classes == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "here"], "--images needs --masks"),
        (["--size", "100"], "--size and --crop must be multiples of 8 from 16 on, got 100 and 128"),
        (["--crop", "8"], "--size and --crop must be multiples of 8 from 16 on, got 256 and 8"),
        (["--width", "100"], "--width must be a multiple of 64, got 100"),
        (["--layers", "1", "9"], "--layers must be ascending, from 0 to below --depth 8, got [1, 9]"),
        (["--layers", "5", "1"], "--layers must be ascending, from 0 to below --depth 8, got [5, 1]"),
        (["--classes", "1"], "--classes must be 2 to 254, got 1"),
        (["--threshold", "nan"], "must be a number or 'calibrated', got 'nan'"),
        (["--threshold", "much"], "must be a number or 'calibrated', got 'much'"),
        (["--steps", "0"], "a whole number of 1 or more, got '0'"),
    ],
)
def test_bad_arguments(demo, capsys, arguments, message):
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_folders(demo, folders, tmp_path):
    with pytest.raises(SystemExit, match=r"--masks .*nowhere: the folder does not exist"):
        demo.main([*SMALL, *folders[:3], str(tmp_path / "nowhere"), "--out", str(tmp_path)])
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit, match="cannot write there"):
        demo.main([*SMALL, *folders, "--out", str(tmp_path / "taken")])


def test_every_class_has_a_different_colour(demo):
    colors = demo.palette(20)
    assert colors.shape == (256, 3)
    assert len(colors[:20].unique(dim=0)) == 20
    assert not colors[demo.masks.IGNORE].any()
