# SPDX-License-Identifier: MIT
"""A segmenter on photographs, with all tokens and with ALGM: accuracy, speed and pictures.

    python experiments/segment.py
    python experiments/segment.py --images photos --masks masks

Trains a small vision transformer with a linear decoder (Segmenter) on crops of photographs. After a common first part,
the training ends once without ALGM and once with it; ALGM is also put into the model trained without it. Prints a
table, and writes into --out: a picture of each test crop with its masks and tokens, the calibrated thresholds, and the
figures as JSON.

The masks are derived from the photographs (see masks.py), or are PNGs of class ids with the names of the pictures in
--images, where 255 means no class. The test crops are cut from one end of each picture, which training never sees.
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

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for benchmarks

import torch
import torch.nn.functional as F
from drawing import save_sheet, side_by_side
from masks import IGNORE, Data, crops, load
from measuring import choose_device, describe, make_folder, positive, print_columns, speeds
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import tokred_kernels as tk
from tokred_kernels.files import replace_text
from tokred_kernels.models.imports import import_with_torchvision

PATCH = 8
HEAD_WIDTH = 64
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # share of all steps
COMMON = 0.6  # share of all steps
CALIBRATED = "calibrated"
CALIBRATION = 4  # batches
PICTURE = 320  # pixels
LEGEND = """
mIoU: percent, over all test crops. tokens: at the decoder, mean over the test crops. GFLOPs: per image, a multiply-add
counts as two. faster: median over rounds, relative to the plain model in the same round."""
QUICK: dict[str, Any] = {"size": 64, "crop": 64, "steps": 3, "batch": 2, "width": 64, "depth": 3, "layers": [0, 1]}
# The palette of Okabe and Ito, which suits colour-blind readers.
COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#555555"]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    make_folder(options.out)
    device = choose_device(options.device)
    data = load(options, device)
    print(f"{len(data.train)} pictures, {data.classes} classes, {options.size} px, {describe(device)}")

    # A common first part of the training stands for pretraining.
    begun = begin(data, options, device)
    common = round(COMMON * options.steps)
    train(*begun, data, options, range(common), "training")
    algm_begun = copy.deepcopy(begun)
    plain = train(*begun, data, options, range(common, options.steps), "training, plain")
    calibrated = calibrate(plain, data, options)
    print(f"\n{calibrated}")
    settings = algm(options, calibrated)
    print(f"Windows merge if their mean cosine is at least {settings['threshold']:.4f}.")
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
    print(f"\nIn {options.out}/: segment.png, one picture per test crop, segment.json, thresholds.json")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="a folder (default: photographs of scikit-learn and scikit-image)")
    parser.add_argument("--masks", type=Path, help="folder of their masks")
    parser.add_argument("--classes", type=positive, default=6, help="number of classes of derived masks (%(default)s)")
    parser.add_argument("--size", type=positive, default=256, help="pixels of a test crop (%(default)s)")
    parser.add_argument("--crop", type=positive, default=128, help="pixels of a training crop (%(default)s)")
    parser.add_argument("--width", type=positive, default=128, help="embedding dimension (%(default)s)")
    parser.add_argument("--depth", type=positive, default=8, help="number of blocks (%(default)s)")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[0, 4], help="blocks, from 0, that merge windows, then pairs"
    )
    parser.add_argument("--threshold", type=_threshold, default=0.98, help="a cosine, or 'calibrated' (%(default)s)")
    parser.add_argument("--steps", type=positive, default=300, help="training steps (%(default)s)")
    parser.add_argument("--batch", type=positive, default=8, help="batch size (%(default)s)")
    parser.add_argument("--seconds", type=positive, default=30, help="time limit of the timings (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps, as a test")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK, seconds=1)
    options = parser.parse_args(arguments)
    if (options.images is None) != (options.masks is None):
        parser.error("--images needs --masks, and --masks needs --images")
    if any(length % PATCH or length < 2 * PATCH for length in (options.size, options.crop)):
        parser.error(
            f"--size and --crop must be multiples of {PATCH} from {2 * PATCH} on, got {options.size} and {options.crop}"
        )
    if options.width % HEAD_WIDTH:
        parser.error(f"--width must be a multiple of {HEAD_WIDTH}, got {options.width}")
    first, last = options.layers[0], options.layers[-1]
    if options.layers != sorted(set(options.layers)) or not 0 <= first <= last < options.depth:
        parser.error(f"--layers must be ascending, from 0 to below --depth {options.depth}, got {options.layers}")
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
    """Return a new segmenter and its optimizer. It has no position embedding: classes do not depend on positions."""
    torch.manual_seed(options.seed)
    vit = import_with_torchvision("timm").models.vision_transformer.VisionTransformer
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
    """Return the settings for `tk.patch`. The number of merged tokens depends on the image.

    Attention counts the sizes of tokens, because the plain model has learnt with all tokens.
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
    """Train for these steps, and return the segmenter in eval mode. The crops depend only on the number of the step."""
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
    """Return thresholds from the similarity of the plain model's tokens on training crops."""
    batches = [crops(data, options, options.steps + number) for number in range(CALIBRATION)]
    return tk.calibrate_thresholds(segmenter.encoder, batches, layers=options.layers)


@torch.inference_mode()
def evaluate(name: str, segmenter: tk.nn.LinearSegmenter, data: Data, options: argparse.Namespace) -> dict[str, Any]:
    """Return a row: scores on the test crops, tokens and operations."""
    confusion = torch.zeros(data.classes, data.classes, dtype=torch.long, device=data.truth.device)
    kept, gflops = [], []
    for images, truth in zip(data.images.split(options.batch), data.truth.split(options.batch), strict=True):
        found = segmenter(images).argmax(1)
        counted = truth != IGNORE
        index = truth[counted] * data.classes + found[counted]
        confusion += index.bincount(minlength=data.classes**2).view_as(confusion)
        kept += tokens_left(segmenter, images)
        gflops += [tk.flops.count(segmenter.encoder, options.size).gflops] * len(images)  # the mean over the batch
    hit = confusion.diag().double()
    union = confusion.sum(0) + confusion.sum(1) - hit
    iou = (hit / union)[union > 0]  # without the classes that do not occur
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
    """Return how many tokens of each image reached the decoder in the last forward pass, which must be of `images`."""
    if not hasattr(segmenter.encoder, "token_map"):
        return [images[0, 0].numel() // PATCH**2] * len(images)
    token_map = segmenter.encoder.token_map
    return [token_map.num_out] * len(images) if token_map.packed is None else list(token_map.packed.lengths)


def timings(segmenters: list[tk.nn.LinearSegmenter], data: Data, options: argparse.Namespace) -> list[dict[str, float]]:
    """Return the speed of each segmenter on a batch of test crops."""
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
    print_columns(list(columns), [[show(row) for show in columns.values()] for row in rows])
    print(LEGEND)


@torch.inference_mode()
def write_pictures(out: Path, segmenters: dict[str, tk.nn.LinearSegmenter], data: Data) -> None:
    """Save a strip for each test crop: its picture, its mask, and the masks and merged tokens of each segmenter."""
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
    save_sheet(strips, out / "segment.png")


def palette(classes: int) -> Tensor:
    """Return (256, 3) uint8: a colour for each class, and black for no class."""
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
