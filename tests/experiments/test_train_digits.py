# SPDX-License-Identifier: MIT
"""The experiment on handwritten digits, with a tiny model and a few steps."""

import json
from pathlib import Path

import pytest
import torch

import tokred_kernels as tk

for needed in ("tqdm", "sklearn", "matplotlib", "PIL"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parents[2]
# The pages with the tables of the recorded runs.
PAGES = {"digits": "README.md", "textures": "docs/lookupvit.md", "faces": "docs/lookupvit.md"}
TINY = ["--quick", "--device", "cpu", "--batch", "512"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def example(load_experiment):
    return load_experiment("train_digits")


def test_the_whole_run(example, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    example.main([*TINY, "--out", str(out)])
    printed = capsys.readouterr().out
    assert "seed 0: 1297 digits to train on, 500 to test, 64 tokens, CPU" in printed
    report = json.loads((out / "digits.json").read_text())
    assert report["took_seconds"] >= 0
    assert report["device"].startswith("CPU")
    rows = report["rows"]
    plain = ["none", "tome", "dynamicvit", "evit", "diffrate"]
    assert [row["method"] for row in rows] == [*plain, *(f"lookupvit {n}x{n}" for n in (2, 3, 4, 5))]
    assert rows[0]["speedup"] == 1
    assert rows[0]["tokens"] == [65] * 4
    for row in rows[1:]:
        assert row["tokens"][-1] < 65
        assert row["gflops"] < rows[0]["gflops"]
        assert row["images_per_s"] > 0
        assert 0 <= row["accuracy"] <= 100
        assert row["accuracies"] == [row["accuracy"]]
    table = (out / "digits.md").read_text().strip()
    assert table in printed
    assert table == example.markdown(rows)
    assert set(json.loads((out / "diffrate-0.json").read_text())) >= {"prune_kept_num", "merge_kept_num"}
    assert (out / "digits.png").stat().st_size > 1000


def test_one_method_comes_with_the_plain_model(example, tmp_path):
    example.main([*TINY, "--method", "tome", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "digits.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["none", "tome"]


def test_several_seeds_are_independent_runs(example, tmp_path):
    def rows(*arguments):
        example.main([*TINY, "--method", "tome", *arguments, "--out", str(tmp_path)])
        return json.loads((tmp_path / "digits.json").read_text())["rows"]

    both = rows("--seed", "3", "--seeds", "2")
    apart = rows("--seed", "3"), rows("--seed", "4")
    assert [row["accuracies"] for row in both] == [[a["accuracy"], b["accuracy"]] for a, b in zip(*apart, strict=True)]


def test_the_table_of_several_seeds_has_means_and_the_range_of_changes(example):
    runs = [[(90.0, 0.04), (91.0, 0.02)], [(96.0, 0.04), (92.0, 0.03)]]
    rows = example.over_seeds(
        [
            [
                {"method": name, "accuracy": accuracy, "tokens": (65, left), "gflops": gflops}
                for name, left, (accuracy, gflops) in zip(("none", "tome"), (65, 20 + number), own, strict=True)
            ]
            for number, own in enumerate(runs)
        ]
    )
    for row in rows:
        row.update(images_per_s=100.0, speedup=1.0)
    assert example.markdown(rows).splitlines()[2:] == [
        "| none | 93.0 % | +0.0 | 65 of 65 | 0.0400 | 0% | 100 | 1.00x |",
        "| tome | 91.5 % | -1.5 (-4.0 to +1.0) | 20.5 of 65 | 0.0250 | 38% | 100 | 1.00x |",
    ]


def test_the_seed_determines_the_split(example):
    data, again = (example.load("digits", 0, torch.device("cpu")) for _ in range(2))
    assert len(data.train) + len(data.test) == 1797
    assert data.test.shape == (500, 1, 32, 32)
    assert data.test_labels.bincount().min() >= 45
    assert all(torch.equal(a, b) for a, b in zip(data, again, strict=True))
    assert abs(data.train.mean()) < 1e-3
    assert not torch.equal(example.load("digits", 1, torch.device("cpu")).test, data.test)


def test_textures_have_equal_classes_and_equal_brightness(example):
    data = example.load("textures", 0, torch.device("cpu"))
    assert data.classes == 6
    assert data.train.shape == (2604, 1, 32, 32)
    assert data.test.shape == (1200, 1, 32, 32)
    assert data.test_labels.bincount().tolist() == [200] * 6
    assert data.test.mean((1, 2, 3)).abs().max() < 1e-4
    assert (data.test.std((1, 2, 3)) - 1).abs().max() < 1e-2


def test_as_many_seeds_as_folds_test_every_face_once(example):
    parts = [example.load("faces", seed, torch.device("cpu")) for seed in range(5)]
    assert [(len(data.train), len(data.test)) for data in parts] == [(160, 40)] * 5
    assert all(data.test_labels.bincount().tolist() == [20, 20] for data in parts)
    assert len(torch.cat([data.test for data in parts]).unique(dim=0)) == 200
    assert len(torch.cat([parts[3].train, parts[3].test]).unique(dim=0)) == 200
    assert parts[0].train.mean((1, 2, 3)).abs().max() < 1e-4
    other = example.load("faces", 5, torch.device("cpu"))
    assert other.test.shape == (40, 1, 32, 32)
    assert not torch.equal(other.test, parts[0].test)


def test_augmentation_depends_on_the_epoch_only(example):
    data = example.load("digits", 0, torch.device("cpu"))
    options = example.parse(["--batch", "100"])
    epochs = [list(example.shuffled(data, options, epoch)) for epoch in (0, 0, 1)]
    assert sum(len(labels) for _, labels in epochs[0]) == len(data.train)
    for first, second, third in zip(*epochs, strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        assert not torch.equal(first[0], third[0])


def tuned(example, scale=1.0):
    """A small model after an epoch of 3 steps with its last block as the fresh part, and its parameters before."""
    options = example.parse(["--quick", "--tuning", "1", "--batch", "512"])
    data = example.load("digits", 0, torch.device("cpu"))
    model = example.make(options, data.classes, torch.device("cpu"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fresh = model.blocks[-1]

    def loss(images, labels):
        return scale * torch.nn.functional.cross_entropy(model(images), labels)

    return example.train(model, data, options, example.fine_tuning(options), "", loss=loss, fresh=fresh), before


def test_fresh_parameters_learn_alone_at_first(example, monkeypatch):
    monkeypatch.setattr(example, "ALONE", 1.0)
    model, before = tuned(example)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if name.startswith("blocks.2.")}


def test_gradients_of_fresh_and_other_parameters_are_clipped_separately(example):
    model, _ = tuned(example, scale=1e6)
    for parameters in (group["params"] for group in example.groups(model, model.blocks[-1])):
        norm = torch.stack([parameter.grad.norm() for parameter in parameters if parameter.grad is not None]).norm()
        assert norm == pytest.approx(example.GRADIENT_BOUND, rel=1e-3)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--width", "50"], "--width must be a multiple of 32, got 50"),
        (["--depth", "2"], "--depth must be at least 3"),
        (["--epochs", "0"], "--epochs"),
        (["--rate", "nan"], "argument --rate: must be a finite number above 0, got 'nan'"),
        (["--rate", "-1"], "argument --rate: must be a finite number above 0, got '-1'"),
        (["--rate", "fast"], "argument --rate"),
        (["--seeds", "0"], "--seeds"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
    ],
)
def test_bad_arguments(example, arguments, words, capsys):
    with pytest.raises(SystemExit):
        example.parse(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("data", PAGES)
def test_the_pages_have_the_recorded_tables(example, data):
    rows = json.loads((ROOT / "docs" / f"{data}.json").read_text())["rows"]
    assert example.markdown(rows) in (ROOT / PAGES[data]).read_text()


def test_a_vit_can_start_with_the_positions_of_a_lookupvit(example):
    def positions(*arguments):
        options = example.parse(["--quick", *arguments])
        return example.make(options, 10, torch.device("cpu")).pos_embed[:, 1:]

    lookup = tk.nn.LookupViT(img_size=32, patch_size=4, in_chans=1, embed_dim=32, num_heads=1, grid=(2, 2))
    assert torch.equal(positions("--positions", "waves"), lookup.pos_embed)
    assert not torch.equal(positions(), lookup.pos_embed)
