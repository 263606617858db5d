# SPDX-License-Identifier: MIT
"""A segmenter on real photographs, with all its tokens and with ALGM: how good, how fast, and why.

    python experiments/segment.py
    python experiments/segment.py --images photos --masks masks

Trains a small vision transformer with a linear decoder (Segmenter) on crops of photographs, and then, from the same
beginnings, to its end without ALGM and with it; the plain one is tested with ALGM put into it too. Prints a table, and
writes into --out: a picture of each test crop with its masks and tokens, the thresholds that calibration gives, and the
figures as JSON.

The masks are derived from the photographs (see masks.py), or are PNGs of class ids, named as the pictures of --images
are; 255 is no class. Of every picture one end is held out: training never sees it, and the test crops are cut from it.
"""

from __future__ import annotations

import argparse
import colorsys
import copy
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate_vit import _positive as positive
from accelerate_vit import choose_device, describe
from drawing import side_by_side
from masks import IGNORE, Data, crops, load
from measuring import speeds
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import tokred_kernels as tk
from tokred_kernels.files import replace_text

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for benchmarks.harness
from benchmarks.harness.torchvision_shim import import_library

PATCH = 8
HEAD_WIDTH = 64
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # of all steps
COMMON = 0.6  # of all steps
CALIBRATED = "calibrated"
CALIBRATION = 4  # batches of training crops
PICTURE = 320  # pixels of one picture
QUICK: dict[str, Any] = {"size": 64, "crop": 64, "steps": 3, "batch": 2, "width": 64, "depth": 3, "layers": [1, 2]}
# Of Okabe and Ito: eight colours that the colour-blind tell apart too.
COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#555555"]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {options.out}: cannot write there ({error.strerror})") from None
    device = choose_device(options.device)
    data = load(options, device)
    print(f"{len(data.train)} pictures, {data.classes} classes, {options.size} px, {describe(device)}")

    # The first part of the training is common, as published models have their pretraining in common.
    begun = begin(data, options, device)
    common = round(COMMON * options.steps)
    train(*begun, data, options, range(common), "training")
    algm_begun = copy.deepcopy(begun)
    plain = train(*begun, data, options, range(common, options.steps), "training, plain")
    calibrated = calibrate(plain, data, options)
    print(f"\n{calibrated}")
    settings = algm(options, calibrated)
    none = ", which none has" if settings["threshold"] > 1 else ""
    print(f"Windows merge from a mean cosine of {settings['threshold']:.4f} on{none}.")
    put_in = copy.deepcopy(plain)
    tk.patch(put_in.encoder, "algm", **settings)
    tk.patch(algm_begun[0].encoder, "algm", **settings)
    trained = train(*algm_begun, data, options, range(common, options.steps), "training, ALGM")
    segmenters = {"plain": plain, "ALGM put in": put_in, "trained with ALGM": trained}

    rows = [evaluate(name, segmenter, data, options) for name, segmenter in segmenters.items()]
    for row, speed in zip(rows, timings(list(segmenters.values()), data, options), strict=True):
        row.update(speed)
    print_table(rows)
    write_pictures(options.out, segmenters, data)
    calibrated.save(options.out / "thresholds.json")
    report = {"device": describe(device), "torch": torch.__version__, "classes": data.classes, "test": data.names}
    report |= {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    replace_text(options.out / "segment.json", json.dumps({**report, "rows": rows}, indent=1) + "\n")
    print(f"\nIn {options.out}/: segment.png and one picture a test crop, segment.json, thresholds.json")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="a folder (default: photographs of scikit-learn and scikit-image)")
    parser.add_argument("--masks", type=Path, help="the folder of their masks")
    parser.add_argument("--classes", type=positive, default=6, help="of derived masks (%(default)s)")
    parser.add_argument("--size", type=positive, default=256, help="pixels of a test crop (%(default)s)")
    parser.add_argument("--crop", type=positive, default=128, help="pixels of a training crop (%(default)s)")
    parser.add_argument("--width", type=positive, default=128, help="channels of the transformer (%(default)s)")
    parser.add_argument("--depth", type=positive, default=8, help="its blocks (%(default)s)")
    parser.add_argument(
        "--layers", type=positive, nargs="+", default=[1, 5], help="that merge tokens: windows, then pairs"
    )
    parser.add_argument("--threshold", type=_threshold, default=0.98, help="a cosine, or calibrated (%(default)s)")
    parser.add_argument("--steps", type=positive, default=300, help="of training (%(default)s)")
    parser.add_argument("--batch", type=positive, default=8, help="crops at once (%(default)s)")
    parser.add_argument("--seconds", type=positive, default=30, help="of timing, at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU when there is one)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where to write (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps: to see whether it runs")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK, seconds=1)
    options = parser.parse_args(arguments)
    if (options.images is None) != (options.masks is None):
        parser.error("--images and --masks go together")
    if any(length % PATCH or length < 2 * PATCH for length in (options.size, options.crop)):
        parser.error(
            f"--size and --crop must be multiples of {PATCH}, two or more, got {options.size} and {options.crop}"
        )
    if options.width % HEAD_WIDTH:
        parser.error(f"--width must be a multiple of {HEAD_WIDTH}, got {options.width}")
    if options.layers != sorted(set(options.layers)) or options.layers[-1] > options.depth:
        parser.error(f"--layers must rise, up to --depth {options.depth}, got {options.layers}")
    if not 2 <= options.classes < IGNORE:
        parser.error(f"--classes must be 2 to {IGNORE - 1}, got {options.classes}")
    return options


def _threshold(text: str) -> float | str:
    if text == CALIBRATED:
        return text
    try:
        threshold = float(text)
    except ValueError:
        threshold = math.nan
    if math.isnan(threshold):
        raise argparse.ArgumentTypeError(f"must be a number or {CALIBRATED!r}, got {text!r}")
    return threshold


def begin(
    data: Data, options: argparse.Namespace, device: torch.device
) -> tuple[tk.nn.LinearSegmenter, torch.optim.Optimizer]:
    """A segmenter from its seed. It has no position embedding: what a pixel is does not hang on where it is."""
    torch.manual_seed(options.seed)
    vit = import_library("timm").models.vision_transformer.VisionTransformer
    encoder = vit(
        img_size=options.size,
        patch_size=PATCH,
        embed_dim=options.width,
        depth=options.depth,
        num_heads=options.width // HEAD_WIDTH,
        num_classes=0,
        global_pool="",
        class_token=False,
        pos_embed="none",
        dynamic_img_size=True,
    )
    segmenter = tk.nn.LinearSegmenter(encoder, data.classes).to(device)
    return segmenter, torch.optim.AdamW(segmenter.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def algm(options: argparse.Namespace, calibrated: tk.Thresholds) -> dict[str, Any]:
    """What is given to `patch`: every image merges as many of its own tokens as are alike.

    Sizes count in attention: the plain model, which has learnt with all tokens, is to see the same mixture of them.
    """
    first = options.layers[0]
    threshold = calibrated.threshold(first) if options.threshold == CALIBRATED else options.threshold
    return {"layers": tuple(options.layers), "threshold": threshold, "count": "image", "prop_attn": True}


def train(
    segmenter: tk.nn.LinearSegmenter,
    optimizer: torch.optim.Optimizer,
    data: Data,
    options: argparse.Namespace,
    steps: range,
    title: str,
) -> tk.nn.LinearSegmenter:
    """These steps of the training, whose crops hang on the step's number alone; then the segmenter is in eval mode."""
    segmenter.train()
    progress = tqdm(steps, desc=title, unit="step", leave=False)
    for step in progress:
        warmed, done = (step + 1) / (WARM_UP * options.steps), step / options.steps
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(warmed, (1 + math.cos(math.pi * done)) / 2)
        images, truth = crops(data, options, step)
        loss = F.cross_entropy(segmenter(images), truth, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return segmenter.eval()


def calibrate(segmenter: tk.nn.LinearSegmenter, data: Data, options: argparse.Namespace) -> tk.Thresholds:
    """How alike the plain model's tokens are on training crops."""
    batches = [crops(data, options, options.steps + number) for number in range(CALIBRATION)]
    return tk.calibrate_thresholds(segmenter.encoder, batches, layers=options.layers)


@torch.inference_mode()
def evaluate(name: str, segmenter: tk.nn.LinearSegmenter, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """How well it does on the test crops, and with how many tokens and operations."""
    confusion = torch.zeros(data.classes, data.classes, dtype=torch.long, device=data.truth.device)
    kept, gflops = [], []
    for images, truth in zip(data.images.split(options.batch), data.truth.split(options.batch), strict=True):
        found = segmenter(images).argmax(1)
        counted = truth != IGNORE
        index = truth[counted] * data.classes + found[counted]
        confusion += index.bincount(minlength=data.classes**2).view_as(confusion)
        kept += tokens_left(segmenter, images)
        gflops += [tk.flops.count(segmenter.encoder, options.size).gflops] * len(images)  # their mean
    hit = confusion.diag().double()
    union = confusion.sum(0) + confusion.sum(1) - hit
    iou = (hit / union)[union > 0]  # a class that is nowhere has none
    decoder = 2 * statistics.mean(kept) * segmenter.decoder.head.weight.numel() / 1e9
    return {
        "setting": name,
        "miou": 100 * iou.mean().item(),
        "iou": [100 * value for value in iou.tolist()],
        "accuracy": 100 * (hit.sum() / confusion.sum()).item(),
        "tokens_entering": (options.size // PATCH) ** 2,
        "tokens": kept,
        "gflops": statistics.mean(gflops) + decoder,
    }


def tokens_left(segmenter: tk.nn.LinearSegmenter, images: Tensor) -> list[int]:
    """How many tokens of each image reached the decoder in the last forward, which was of these images."""
    if not hasattr(segmenter.encoder, "token_map"):
        return [images[0, 0].numel() // PATCH**2] * len(images)
    token_map = segmenter.encoder.token_map
    return [token_map.num_out] * len(images) if token_map.packed is None else list(token_map.packed.lengths)


def timings(segmenters: list[tk.nn.LinearSegmenter], data: Data, options: argparse.Namespace) -> list[dict[str, float]]:
    """Images a second of each on a batch of test crops."""
    images = data.images.repeat(math.ceil(options.batch / len(data.images)), 1, 1, 1)[: options.batch]
    return speeds([segmenter.forward for segmenter in segmenters], images, options.seconds)


def print_table(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    columns: dict[str, Any] = {
        "": lambda row: row["setting"],
        "mIoU": lambda row: f"{row['miou']:.2f}",
        "change": lambda row: f"{row['miou'] - first['miou']:+.2f}",
        "tokens": lambda row: f"{statistics.mean(row['tokens']):.0f} of {row['tokens_entering']}",
        "(fewest - most)": lambda row: f"({min(row['tokens'])} - {max(row['tokens'])})",
        "GFLOPs": lambda row: f"{row['gflops']:.2f}",
        "images/s": lambda row: f"{row['images_per_s']:.1f}",
        "faster": lambda row: f"{row['speedup']:.2f}x",
    }
    cells = [list(columns), *([show(row) for show in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print()
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(
        "\nmIoU: percent, over all test crops. tokens: that reach the decoder, mean over the test crops. GFLOPs: an "
        "image, a\nmultiply-add being two. faster: median over rounds, each against the plain one in the same round."
    )


@torch.inference_mode()
def write_pictures(out: Path, segmenters: dict[str, tk.nn.LinearSegmenter], data: Data) -> None:
    """Of each test crop a strip: it, its true mask, each segmenter's, and the tokens where they merged."""
    colors = palette(data.classes)
    strips = []
    for number, name in enumerate(tqdm(data.names, desc="pictures", unit="crop", leave=False)):
        crop = Image.fromarray(((data.images[number].permute(1, 2, 0) + 1) * 127.5).round().byte().cpu().numpy())
        parts, captions = [enlarged(crop), painted(data.truth[number], colors)], [name, "true mask"]
        for setting, segmenter in segmenters.items():
            parts.append(painted(segmenter(data.images[number : number + 1])[0].argmax(0), colors))
            captions.append(setting)
            if hasattr(segmenter.encoder, "token_map"):
                token_map, prefix = segmenter.encoder.token_map, segmenter.encoder.num_prefix_tokens
                parts.append(tk.viz.draw_tokens(enlarged(crop), token_map, grid=None, num_prefix=prefix))
                captions.append(f"{token_map.num_out - prefix} of {token_map.num_tokens - prefix} tokens")
        strips.append(side_by_side(parts, captions))
        strips[-1].save(out / f"segment-{name}.png")
    rows = strips[:8]  # more would be a picture that nobody can open
    sheet = Image.new("RGB", (rows[0].width, sum(strip.height for strip in rows)), "white")
    for number, strip in enumerate(rows):
        sheet.paste(strip, (0, number * rows[0].height))
    sheet.save(out / "segment.png")


def palette(classes: int) -> Tensor:
    """(256, 3) uint8: a colour for each class, black for none."""
    rest = [colorsys.hsv_to_rgb(index * 0.618 % 1, 0.6, 0.9) for index in range(max(0, classes - len(COLORS)))]
    given = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in COLORS]
    colors = given + [[round(255 * part) for part in color] for color in rest]
    return torch.tensor(colors[:classes] + [[0, 0, 0]] * (256 - classes), dtype=torch.uint8)


def painted(mask: Tensor, colors: Tensor) -> Image.Image:
    return enlarged(Image.fromarray(colors[mask.cpu()].numpy()), Image.Resampling.NEAREST)


def enlarged(picture: Image.Image, how: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    return picture.resize((PICTURE, PICTURE), how)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
