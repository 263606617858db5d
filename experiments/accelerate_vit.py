# SPDX-License-Identifier: MIT
"""A vision transformer on photographs, unpatched and with fewer and fewer tokens: speed, accuracy and pictures.

    python experiments/accelerate_vit.py
    python experiments/accelerate_vit.py --images ~/Pictures --model vit_base_patch16_224 --r 4 8 12
    python experiments/accelerate_vit.py --method algm --threshold 0.95 0.9 0.85

Prints a table, and writes into --out: pictures of the merged tokens of each photograph, a plot of speed against r or
the threshold, and the figures as JSON.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import statistics
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for benchmarks

import photos
import torch
from drawing import write_pictures, write_plot
from measuring import choose_device, describe, in_turns, make_folder, positive, print_columns
from PIL import Image, ImageOps
from torch import Tensor, nn

import tokred_kernels as tk
from benchmarks.harness.memory import peak_bytes
from tokred_kernels.files import replace_text
from tokred_kernels.models.imports import import_with_torchvision


class Method(NamedTuple):
    """How a method uses the number of a row.

    Attributes:
        label: of a row, with the number.
        axis: label of the plot's axis.
        settings: for `tk.patch`, from the number and the command line.
        trial: a number to find out whether the model can be patched.
    """

    label: str
    axis: str
    settings: Callable[[float, argparse.Namespace], dict[str, Any]]
    trial: float


METHODS = {
    "tome": Method("r = {:g}", "r, tokens removed in each block", lambda r, _: {"r": int(r)}, 1),
    "algm": Method(
        "threshold {:g}",
        "threshold, least mean cosine of a window that merges",
        lambda threshold, options: {"threshold": threshold, "layers": options.layers, "count": options.count},
        0.9,
    ),
}
DEFAULT_R = (0, 4, 8, 12, 16)
SHARES = (0.25, 0.5, 0.75, 0.95)  # the default thresholds merge these shares of all windows
WINDOW = 2  # patches in each direction, ALGM's default
UNPATCHED = "unpatched"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    make_folder(options.out)
    pictures = photos.load(options.images)
    device = choose_device(options.device)
    torch.manual_seed(0)
    model, pretrained = load_model(options)
    model = model.to(device).eval().requires_grad_(False)
    height, width = model.patch_embed.img_size
    crops = [ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC) for picture in pictures.values()]
    images = normalised(model, crops, device)
    batch = options.batch or (8 if device.type == "cpu" else 64)
    print(f"{options.model}, {len(pictures)} photographs, batch {batch}, {describe(device)}")
    if not pretrained:
        print("With random weights the speed is the same, but the pictures and features mean little.")

    rows, maps = measure(model, images, batch, numbers(model, images, options), options)
    print_columns([title for title, _ in COLUMNS], [[show(row) for _, show in COLUMNS] for row in rows])
    print(LEGEND)
    layout = {"size": (width, height), "grid": model.patch_embed.grid_size, "prefix": model.num_prefix_tokens}
    write_pictures(options.out, pictures, maps, **layout)
    title = f"{options.model}, {options.method}, {describe(device)}"
    write_plot(options.out / "speed.png", rows, title, METHODS[options.method].axis)
    report = {"model": options.model, "pretrained": pretrained, "method": options.method, "batch": batch}
    report |= {"device": describe(device), "torch": torch.__version__, "rows": rows}
    replace_text(options.out / "figures.json", json.dumps(report, indent=1) + "\n")
    print(f"\nIn {options.out}/: tokens.png, one picture per photograph, speed.png, figures.json")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="a folder (default: photographs of scikit-learn and scikit-image)")
    parser.add_argument("--model", default="deit_small_patch16_224", help="name of a ViT in timm (%(default)s)")
    parser.add_argument("--method", default="tome", choices=METHODS, help="reduction method (%(default)s)")
    parser.add_argument("--r", type=_natural, nargs="+", help="tome: tokens removed in each block (0 4 8 12 16)")
    parser.add_argument("--threshold", type=_finite, nargs="+",
                        help="algm: cosines (default: those that merge 25, 50, 75, 95 %% of the windows)")  # fmt: skip
    parser.add_argument("--layers", type=_natural, nargs="+", help="algm: blocks that merge tokens, from 0 (0 4)")
    parser.add_argument("--count", choices=("image", "batch"), help="algm: who counts the merging windows (image)")
    parser.add_argument("--batch", type=positive, help="images at once (default: 8, on a GPU 64)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=7, help="timings of each setting (%(default)s)")
    parser.add_argument("--seconds", type=positive, default=60, help="time limit of the timings (%(default)s)")
    parser.add_argument("--random-weights", action="store_true", help="do not look for pretrained weights")
    options = parser.parse_args(arguments)
    for method, names in (("tome", ("r",)), ("algm", ("threshold", "layers", "count"))):
        for name in names:
            if method != options.method and getattr(options, name) is not None:
                parser.error(f"--{name} needs --method {method}, got --method {options.method}")
    options.layers, options.count = options.layers or [0, 4], options.count or "image"
    return options


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of 0 or more, got {text!r}")
    return int(text)


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return number


def load_model(options: argparse.Namespace) -> tuple[nn.Module, bool]:
    """Return the model, and whether its weights are pretrained."""
    if not options.random_weights and not _hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # use only cached weights; otherwise the download retries for a minute
    timm = import_with_torchvision("timm")
    if not timm.is_model(options.model):
        near = difflib.get_close_matches(options.model, timm.list_models(), n=4)
        advice = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has the names"
        raise SystemExit(f"--model {options.model}: timm has no such model; {advice}")
    model = None
    if not options.random_weights:
        try:
            model = timm.create_model(options.model, pretrained=True)
        except Exception as error:  # there are many reasons why a download can fail
            print(
                f"Notice: random weights, because loading pretrained ones failed ({str(error).partition(chr(10))[0]})"
            )
    pretrained = model is not None
    model = model or timm.create_model(options.model)
    try:
        with patched(model, options, METHODS[options.method].trial):
            pass
    except (NotImplementedError, ValueError) as error:
        raise SystemExit(f"--model {options.model}: {error}") from None
    return model, pretrained


def _hub_answers() -> bool:
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def normalised(model: Any, crops: list[Image.Image], device: torch.device) -> Tensor:
    """Return the crops (number, 3, H, W) with the normalisation of the model's training."""
    raw = [
        torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(crop.height, crop.width, 3)
        for crop in crops
    ]
    x = torch.stack(raw).permute(0, 3, 1, 2).to(device).float() / 255
    mean, std = (torch.tensor(model.pretrained_cfg[name], device=device).view(3, 1, 1) for name in ("mean", "std"))
    return (x - mean) / std


@torch.inference_mode()
def numbers(model: Any, images: Tensor, options: argparse.Namespace) -> list[float]:
    """Return the number of each row, those that remove the fewest tokens first."""
    if options.method == "tome":
        return sorted(set(DEFAULT_R if options.r is None else options.r))
    if options.threshold is not None:
        return sorted(set(options.threshold), reverse=True)
    seen: list[Tensor] = []
    block = model.blocks[options.layers[0]]
    hook = block.norm2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(images)
    hook.remove()
    found = window_cosines(seen[0][:, model.num_prefix_tokens :], model.patch_embed.grid_size)
    chosen = torch.quantile(found, 1 - torch.tensor(SHARES, device=found.device)).tolist()
    return sorted({round(value, 4) for value in chosen}, reverse=True)


def window_cosines(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean cosine of the pairs of different tokens in each window of x (B, h w, C), as one row."""
    down, across = grid[0] // WINDOW, grid[1] // WINDOW
    unit = nn.functional.normalize(x.float(), dim=-1).unflatten(1, grid)[:, : down * WINDOW, : across * WINDOW]
    total = unit.unflatten(2, (across, WINDOW)).unflatten(1, (down, WINDOW)).sum((2, 4))
    return ((total.square().sum(-1) - WINDOW**2) / (WINDOW**2 * (WINDOW**2 - 1))).flatten()


@torch.inference_mode()
def measure(
    model: nn.Module, images: Tensor, batch: int, values: list[float], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, list[tk.TokenMap]]]:
    """Return a row for the unpatched model and each value, and the map of each image by the label of its row."""
    x = images.repeat(math.ceil(batch / len(images)), 1, 1, 1)[:batch]
    scopes = [partial(patched, model, options, value) for value in (None, *values)]
    rows, maps, first = [], {}, torch.empty(0)
    for value, scope in zip((None, *values), scopes, strict=True):
        with scope():
            parts = [features(model, part) for part in images.split(batch)]  # a folder can have more than a batch
            found = torch.cat([part for part, _ in parts])
            first = found if value is None else first
            label = UNPATCHED if value is None else METHODS[options.method].label.format(value)
            maps[label] = [whole.image(index) for _, whole in parts if whole for index in range(whole.batch)]
            peak = peak_bytes(lambda: model(x), x.device.type)
            counts = tk.flops.count(model)
            rows.append({
                "setting": label,
                "value": value,
                "tokens": counts.tokens[-1],
                "gflops": counts.gflops,
                "peak_mib": peak / 2**20,
                "cosine": nn.functional.cosine_similarity(found, first).mean().item(),
                "relative_l2": ((found - first).norm(dim=1) / first.norm(dim=1)).mean().item(),
            })  # fmt: skip
    calls = [lambda: model(x)] * len(scopes)
    times = in_turns(calls, scopes, x.device, options.rounds, options.seconds)
    for row, own in zip(rows, times, strict=True):
        ratios = [base / mine for base, mine in zip(times[0], own, strict=True)]
        row["images_per_s"] = batch / statistics.median(own)
        row["speedup"] = statistics.median(ratios)
        row["speedup_lowest"], row["speedup_highest"] = min(ratios), max(ratios)
        row["flops_ratio"] = rows[0]["gflops"] / row["gflops"]
    return rows, maps


@contextmanager
def patched(model: nn.Module, options: argparse.Namespace, value: float | None) -> Iterator[None]:
    """Patch the model with the settings of `value`, or not at all if it is None."""
    if value is not None:
        tk.patch(model, options.method, **METHODS[options.method].settings(value, options))
    yield
    if value is not None:
        tk.unpatch(model)


def features(model: Any, x: Tensor) -> tuple[Tensor, tk.TokenMap | None]:
    """Return the input of the head (B, C), float32, and a patched model's map."""
    found = model.forward_head(model.forward_features(x), pre_logits=True).float()
    return found, getattr(model, "token_map", None)


COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("", lambda row: row["setting"]),
    ("tokens", lambda row: f"{row['tokens']:.4g}"),
    ("GFLOPs", lambda row: f"{row['gflops']:.2f}"),
    ("fewer", lambda row: f"{row['flops_ratio']:.2f}x"),
    ("images/s", lambda row: f"{row['images_per_s']:.1f}"),
    ("faster", lambda row: f"{row['speedup']:.2f}x"),
    ("(lowest - highest)", lambda row: f"({row['speedup_lowest']:.2f} - {row['speedup_highest']:.2f})"),
    ("peak MiB", lambda row: f"{row['peak_mib']:.0f}"),
    ("cosine", lambda row: f"{row['cosine']:.4f}"),
    ("relative L2", lambda row: f"{row['relative_l2']:.3f}"),
]
LEGEND = """
tokens: mean number at the head. GFLOPs: per image, a multiply-add counts as two. faster: median over rounds, relative
to the unpatched model in the same round. peak: tensors of one forward pass, without weights and input. cosine, relative
L2: features before the head, relative to the unpatched model's."""


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
