# SPDX-License-Identifier: MIT
"""A vision transformer on real photographs, unpatched and with fewer and fewer tokens: how fast, how far off, and why.

    python examples/accelerate_vit.py
    python examples/accelerate_vit.py --images ~/Pictures --model vit_base_patch16_224 --r 4 8 12
    python examples/accelerate_vit.py --method algm --threshold 0.95 0.9 0.85

Prints a table, and writes into --out: what became of the tokens of each photograph, a plot of speed against r or the
threshold, and the figures as JSON.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import platform
import statistics
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import photos
import torch
from drawing import write_pictures, write_plot
from measuring import in_turns, peak_memory
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

from tokred_kernels import flops
from tokred_kernels.files import replace_text
from tokred_kernels.models.imports import import_timm
from tokred_kernels.patching import patch, unpatch
from tokred_kernels.token_map import TokenMap


class Method(NamedTuple):
    """What the number of a row means to a method.

    Attributes:
        label: of a row, with the number.
        axis: what the number is, below the plot.
        settings: for `patch`, from the number and the command line.
        trial: a number to see with whether the model can be patched.
    """

    label: str
    axis: str
    settings: Callable[[float, argparse.Namespace], dict[str, Any]]
    trial: float


METHODS = {
    "tome": Method("r = {:g}", "r, tokens removed in each block", lambda r, _: {"r": int(r)}, 1),
    "algm": Method(
        "threshold {:g}",
        "threshold, mean cosine from which on a window merges",
        lambda threshold, options: {"threshold": threshold, "layers": options.layers, "count": options.count},
        0.9,
    ),
}
DEFAULT_R = (0, 4, 8, 12, 16)
SHARES = (0.25, 0.5, 0.75, 0.95)  # of all windows, that reach the thresholds which are chosen where none are given
WINDOW = 2  # patches down and across, as `patch` has it for ALGM
UNPATCHED = "unpatched"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {options.out}: cannot write there ({error.strerror})") from None
    pictures = photos.load(options.images)
    device = choose_device(options.device)
    torch.manual_seed(0)
    model, pretrained = load_model(options)
    model = model.to(device).eval().requires_grad_(False)
    crops = {
        name: ImageOps.fit(picture, _image_size(model), Image.Resampling.BICUBIC) for name, picture in pictures.items()
    }
    images = normalised(model, list(crops.values()), device)
    batch = options.batch or (8 if device.type == "cpu" else 64)
    print(f"{options.model}, {len(pictures)} photographs, batch {batch}, {describe(device)}")
    if not pretrained:
        print("With random weights the speed is the same, but pictures and feature figures mean little.")

    rows, maps = measure(model, images, batch, numbers(model, images, options), options)
    print_table(rows)
    layout = {"size": _image_size(model), "grid": model.patch_embed.grid_size, "prefix": model.num_prefix_tokens}
    write_pictures(options.out, pictures, maps, **layout)
    title = f"{options.model}, {options.method}, {describe(device)}"
    write_plot(options.out / "speed.png", rows, title, METHODS[options.method].axis)
    report = {"model": options.model, "pretrained": pretrained, "method": options.method, "batch": batch}
    report |= {"device": describe(device), "torch": torch.__version__, "rows": rows}
    replace_text(options.out / "figures.json", json.dumps(report, indent=1) + "\n")
    print(f"\nIn {options.out}/: tokens.png and one picture a photograph, speed.png, figures.json")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="a folder (default: photographs of scikit-learn and scikit-image)")
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm's name of a ViT (%(default)s)")
    parser.add_argument("--method", default="tome", choices=METHODS, help="how tokens get fewer (%(default)s)")
    parser.add_argument("--r", type=_natural, nargs="+", help="tome: tokens removed in each block (0 4 8 12 16)")
    parser.add_argument(
        "--threshold",
        type=_finite,
        nargs="+",
        help="algm: cosines (chosen so that 25, 50, 75 and 95 %% of windows merge)",
    )
    parser.add_argument("--layers", type=_natural, nargs="+", help="algm: blocks that merge, from 0 on (0 4)")
    parser.add_argument("--count", choices=("image", "batch"), help="algm: whose count of merging windows (image)")
    parser.add_argument("--batch", type=_positive, help="images at once (default: 8, on a GPU 64)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU when there is one)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where to write (%(default)s)")
    parser.add_argument("--rounds", type=_positive, default=7, help="timings of each setting (%(default)s)")
    parser.add_argument("--seconds", type=_positive, default=60, help="stop timing after so long (%(default)s)")
    parser.add_argument("--random-weights", action="store_true", help="do not look for pretrained weights")
    parser.add_argument("--weights-timeout", type=_positive, default=120, help="seconds to fetch weights (%(default)s)")
    options = parser.parse_args(arguments)
    for method, names in (("tome", ("r",)), ("algm", ("threshold", "layers", "count"))):
        for name in names:
            if method != options.method and getattr(options, name) is not None:
                parser.error(f"--{name} is of --method {method}, got --method {options.method}")
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise SystemExit(f"--device {name}: torch cannot use it here ({reason})") from None
    return device


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def load_model(options: argparse.Namespace) -> tuple[nn.Module, bool]:
    """The model, and whether its weights are the pretrained ones."""
    reachable = options.random_weights or _hub_answers()
    if not reachable:
        os.environ["HF_HUB_OFFLINE"] = "1"  # else it retries for a minute; what is cached is still found
    timm = import_timm()
    if not timm.is_model(options.model):
        near = difflib.get_close_matches(options.model, timm.list_models(), n=4)
        advice = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has the names"
        raise SystemExit(f"--model {options.model}: timm has no such model; {advice}")
    pretrained = (
        None if options.random_weights else _pretrained(timm, options.model, options.weights_timeout, reachable)
    )
    model = pretrained or timm.create_model(options.model)
    try:
        with Variant(model, options, METHODS[options.method].trial):
            pass
    except (NotImplementedError, ValueError) as error:
        raise SystemExit(f"--model {options.model}: {error}") from None
    return model, pretrained is not None


def _hub_answers() -> bool:
    try:
        urllib.request.urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def _pretrained(timm: Any, name: str, seconds: int, reachable: bool) -> nn.Module | None:
    """The model with pretrained weights, or None and a line that says why not."""
    result: list[Any] = []

    def fetch() -> None:
        try:
            result.append(timm.create_model(name, pretrained=True))
        except Exception as error:  # whatever it is, there are no weights
            result.append(error)

    # A thread that is left behind where it takes too long: a download has no time limit of its own.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
    if result and isinstance(result[0], nn.Module):
        return result[0]
    why = "the weights' host does not answer and none are cached"
    if reachable:
        why = str(result[0]).partition("\n")[0] if result else f"not fetched within {seconds} s"
    print(f"Notice: no pretrained weights ({why}): random weights instead.")
    return None


def _image_size(model: Any) -> tuple[int, int]:
    """(width, height), as Pillow has it."""
    height, width = model.patch_embed.img_size
    return width, height


def normalised(model: Any, crops: list[Image.Image], device: torch.device) -> Tensor:
    """(number of crops, 3, H, W), as the model was trained on."""
    raw = [
        torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(crop.height, crop.width, 3)
        for crop in crops
    ]
    x = torch.stack(raw).permute(0, 3, 1, 2).to(device).float() / 255
    mean, std = (torch.tensor(model.pretrained_cfg[name], device=device).view(3, 1, 1) for name in ("mean", "std"))
    return (x - mean) / std


@torch.inference_mode()
def numbers(model: Any, images: Tensor, options: argparse.Namespace) -> list[float]:
    """One for each row, the one that removes least first."""
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
    """The mean cosine of the pairs of different tokens of each window, all in one row, for x (B, h w, C)."""
    down, across = grid[0] // WINDOW, grid[1] // WINDOW
    unit = nn.functional.normalize(x.float(), dim=-1).unflatten(1, grid)[:, : down * WINDOW, : across * WINDOW]
    total = unit.unflatten(2, (across, WINDOW)).unflatten(1, (down, WINDOW)).sum((2, 4))
    return ((total.square().sum(-1) - WINDOW**2) / (WINDOW**2 * (WINDOW**2 - 1))).flatten()


@torch.inference_mode()
def measure(
    model: nn.Module, images: Tensor, batch: int, values: list[float], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, list[TokenMap]]]:
    """A row of figures for each value, the unpatched model first, and each image's map by the label of its row."""
    repeat = math.ceil(batch / len(images))
    x = images.repeat(repeat, 1, 1, 1)[:batch]
    variants = [partial(Variant, model, options, value) for value in (None, *values)]
    rows, maps, first = [], {}, torch.empty(0)
    progress = tqdm(total=len(variants) * (1 + options.rounds), desc="features", unit="step", leave=False)
    for value, variant in zip((None, *values), variants, strict=True):
        with variant():
            # In batches, as a folder may hold more pictures than go in at once.
            parts = [features(model, part) for part in images.split(batch)]
            found = torch.cat([part for part, _ in parts])
            first = found if value is None else first
            label = UNPATCHED if value is None else METHODS[options.method].label.format(value)
            maps[label] = [whole.image(index) for _, whole in parts if whole for index in range(whole.batch)]
            peak = peak_memory(model, x)
            counts = flops.count(model)
            rows.append(
                {
                    "setting": label,
                    "value": value,
                    "tokens": counts.tokens[-1],
                    "gflops": counts.gflops,
                    "peak_mib": peak / 2**20,
                    "cosine": nn.functional.cosine_similarity(found, first).mean().item(),
                    "relative_l2": ((found - first).norm(dim=1) / first.norm(dim=1)).mean().item(),
                }
            )
        progress.update()

    progress.set_description("timing")
    times = in_turns(model, x, variants, options.rounds, options.seconds, progress)
    progress.close()
    for row, own in zip(rows, times, strict=True):
        row["images_per_s"] = batch / statistics.median(own)
        ratios = [base / mine for base, mine in zip(times[0], own, strict=True)]
        row["speedup"] = statistics.median(ratios)
        row["speedup_lowest"], row["speedup_highest"] = min(ratios), max(ratios)
        row["flops_ratio"] = rows[0]["gflops"] / row["gflops"]
    return rows, maps


class Variant:
    """The model patched with what `value` means, inside a `with` block; left alone where that is None."""

    def __init__(self, model: nn.Module, options: argparse.Namespace, value: float | None) -> None:
        self.model, self.options, self.value = model, options, value

    def __enter__(self) -> None:
        if self.value is not None:
            settings = METHODS[self.options.method].settings(self.value, self.options)
            patch(self.model, self.options.method, **settings)

    def __exit__(self, *_: object) -> None:
        if self.value is not None:
            unpatch(self.model)


def features(model: Any, x: Tensor) -> tuple[Tensor, TokenMap | None]:
    """What goes into the head, (B, C), in float32; and the map, where the model is patched."""
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


def print_table(rows: list[dict[str, Any]]) -> None:
    cells = [[title for title, _ in COLUMNS], *([show(row) for _, show in COLUMNS] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    print()
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(
        "\ntokens: that reach the head, the mean of a batch. GFLOPs: an image, a multiply-add being two. faster: "
        "median over\nrounds, each against the unpatched model in the same round. peak: of tensors in one forward, "
        "beyond weights and\ninput. cosine, relative L2: features before the head against the unpatched model's."
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
