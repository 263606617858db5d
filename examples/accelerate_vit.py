# SPDX-License-Identifier: MIT
"""A vision transformer on real photographs, unpatched and with fewer and fewer tokens: how fast, how far off, and why.

    python examples/accelerate_vit.py
    python examples/accelerate_vit.py --images ~/Pictures --model vit_base_patch16_224 --r 4 8 12

Prints a table, and writes into --out: what became of the tokens of each photograph, a plot of speed against r, and the
figures as JSON.
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
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import photos
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from tokred_kernels import flops, viz
from tokred_kernels.patch import METHODS, patch, unpatch
from tokred_kernels.patch.timm_import import import_timm
from tokred_kernels.token_map import TokenMap

# What one number of --r means to each method.
SETTINGS: dict[str, Callable[[int], dict[str, Any]]] = {"tome": lambda r: {"r": r}}
UNPATCHED = "unpatched"
MIN_SAMPLE = 0.1  # seconds that one timing lasts at least, so that clocks and launches do not show
MIN_ROUNDS = 3
PICTURE = 448  # pixels of one picture, drawn at twice a ViT's usual resolution


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

    rows, maps = measure(model, images, batch, options)
    print_table(rows)
    write_pictures(options.out, pictures, maps, model)
    write_plot(options.out / "speed.png", rows, options, device)
    report = {"model": options.model, "pretrained": pretrained, "method": options.method, "batch": batch}
    report |= {"device": describe(device), "torch": torch.__version__, "rows": rows}
    (options.out / "figures.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nIn {options.out}/: tokens.png and one picture a photograph, speed.png, figures.json")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="a folder (default: photographs of scikit-learn and scikit-image)")
    parser.add_argument("--model", default="deit_small_patch16_224", help="a timm VisionTransformer (%(default)s)")
    parser.add_argument("--method", default="tome", choices=[name for name in METHODS if name in SETTINGS])
    parser.add_argument("--r", type=_natural, nargs="+", default=[0, 4, 8, 12, 16], help="tokens removed in each block")
    parser.add_argument("--batch", type=_positive, help="images at once (default: 8, on a GPU 64)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU when there is one)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where to write (%(default)s)")
    parser.add_argument("--rounds", type=_positive, default=7, help="timings of each setting (%(default)s)")
    parser.add_argument("--seconds", type=_positive, default=60, help="stop timing after so long (%(default)s)")
    parser.add_argument("--random-weights", action="store_true", help="do not look for pretrained weights")
    parser.add_argument("--weights-timeout", type=_positive, default=120, help="seconds to fetch weights (%(default)s)")
    options = parser.parse_args(arguments)
    options.r = sorted(set(options.r))
    return options


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of 0 or more, got {text!r}")
    return int(text)


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
        unpatch(patch(model, options.method, **SETTINGS[options.method](1)))
    except NotImplementedError as error:
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
def measure(
    model: nn.Module, images: Tensor, batch: int, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[int, TokenMap]]:
    """A row of figures for each setting, the unpatched model first, and the map of all images for each r."""
    repeat = math.ceil(batch / len(images))
    x = images.repeat(repeat, 1, 1, 1)[:batch]
    variants: list[int | None] = [None, *options.r]
    rows, maps, first = [], {}, torch.empty(0)
    progress = tqdm(total=len(variants) * (1 + options.rounds), desc="features", unit="step", leave=False)
    for r in variants:
        with Variant(model, options.method, r):
            # In batches, as a folder may hold more pictures than go in at once.
            parts = [features(model, part) for part in images.split(batch)]
            found = torch.cat([part for part, _ in parts])
            first = found if r is None else first
            if r is not None:
                dest = torch.cat([token_map.dest for _, token_map in parts if token_map is not None])
                maps[r] = TokenMap.from_dest(dest)
            counts = flops.count(model)
            rows.append(
                {
                    "setting": UNPATCHED if r is None else f"r = {r}",
                    "r": r,
                    "tokens": counts.tokens[-1],
                    "gflops": counts.gflops,
                    "peak_mib": peak_memory(model, x) / 2**20,
                    "cosine": nn.functional.cosine_similarity(found, first).mean().item(),
                    "relative_l2": ((found - first).norm(dim=1) / first.norm(dim=1)).mean().item(),
                }
            )
        progress.update()

    progress.set_description("timing")
    times = timings(model, x, variants, options, progress)
    progress.close()
    for row, own in zip(rows, times, strict=True):
        row["images_per_s"] = batch / statistics.median(own)
        ratios = [base / mine for base, mine in zip(times[0], own, strict=True)]
        row["speedup"] = statistics.median(ratios)
        row["speedup_lowest"], row["speedup_highest"] = min(ratios), max(ratios)
        row["flops_ratio"] = rows[0]["gflops"] / row["gflops"]
    return rows, maps


class Variant:
    """The model patched with `r` inside a `with` block; left alone where r is None."""

    def __init__(self, model: nn.Module, method: str, r: int | None) -> None:
        self.model, self.method, self.r = model, method, r

    def __enter__(self) -> None:
        if self.r is not None:
            patch(self.model, self.method, **SETTINGS[self.method](self.r))

    def __exit__(self, *_: object) -> None:
        if self.r is not None:
            unpatch(self.model)


def features(model: Any, x: Tensor) -> tuple[Tensor, TokenMap | None]:
    """What goes into the head, (B, C), in float32; and the map, where the model is patched."""
    found = model.forward_head(model.forward_features(x), pre_logits=True).float()
    return found, getattr(model, "token_map", None)


def timings(
    model: nn.Module, x: Tensor, variants: list[int | None], options: argparse.Namespace, progress: tqdm
) -> list[list[float]]:
    """Seconds a batch of each variant in each round: all of them in turn, so that all meet the same machine."""
    times: list[list[float]] = [[] for _ in variants]
    repeats = max(1, math.ceil(MIN_SAMPLE / timed(model, x, 1)))
    begin = time.perf_counter()
    for number in range(options.rounds):
        if number >= MIN_ROUNDS and (time.perf_counter() - begin) * (number + 1) / number > options.seconds:
            break
        order = range(len(variants)) if number % 2 == 0 else range(len(variants) - 1, -1, -1)
        for index in order:
            with Variant(model, options.method, variants[index]):
                times[index].append(timed(model, x, repeats))
            progress.update()
    return times


def timed(model: nn.Module, x: Tensor, repeats: int) -> float:
    """Seconds a call, over `repeats` calls."""
    synchronize(x.device)
    begin = time.perf_counter()
    for _ in range(repeats):
        model(x)
    synchronize(x.device)
    return (time.perf_counter() - begin) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(model: nn.Module, x: Tensor) -> int:
    """Bytes of tensors that one forward holds at once, at most; weights and input not counted."""
    model(x)  # what is made once and kept is there before
    if x.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        model(x)
        return torch.cuda.max_memory_allocated(x.device) - before
    with LiveTensors() as live:
        model(x)
    return live.peak


class LiveTensors(TorchDispatchMode):
    """Adds up the storages that ops have returned and that are still alive: torch counts this on GPUs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            part.untyped_storage()._cdata for part in pytree.tree_leaves((args, kwargs)) if isinstance(part, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        for part in pytree.tree_leaves(out):
            if isinstance(part, Tensor):
                storage = part.untyped_storage()
                if storage._cdata not in inputs:  # a view of a weight is no new memory
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return out


COLUMNS: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
    ("", lambda row: row["setting"]),
    ("tokens", lambda row: str(row["tokens"])),
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
        "\ntokens: that reach the head. GFLOPs: an image, a multiply-add being two. faster: median over rounds, each "
        "against\nthe unpatched model in the same round. peak: of tensors in one forward, beyond weights and input. "
        "cosine, relative L2:\nfeatures before the head against the unpatched model's."
    )


def write_pictures(out: Path, pictures: dict[str, Image.Image], maps: dict[int, TokenMap], model: Any) -> None:
    """A strip for each photograph, the picture and then its tokens at each r; and all strips in one."""
    width, height = _image_size(model)
    scale = PICTURE / max(width, height)
    size = (round(width * scale), round(height * scale))
    grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
    shown = {r: token_map for r, token_map in maps.items() if r > 0}
    captions = [
        "photograph",
        *(f"r = {r}: {token_map.num_out} of {token_map.num_tokens} tokens" for r, token_map in shown.items()),
    ]
    strips = []
    for index, (name, picture) in enumerate(tqdm(pictures.items(), desc="pictures", unit="photo", leave=False)):
        crop = ImageOps.fit(picture, size, Image.Resampling.BICUBIC)
        drawn = [
            viz.draw_tokens(crop, token_map, grid=grid, num_prefix=prefix, image_index=index)
            for token_map in shown.values()
        ]
        strips.append(side_by_side([crop, *drawn], captions))
        strips[-1].save(out / f"tokens-{name}.png")
    rows = strips[:8]  # more would be a picture that nobody can open
    sheet = Image.new("RGB", (rows[0].width, sum(strip.height for strip in rows)), "white")
    for number, strip in enumerate(rows):
        sheet.paste(strip, (0, number * rows[0].height))
    sheet.save(out / "tokens.png")


def side_by_side(parts: list[Image.Image], captions: list[str], gap: int = 12, line: int = 34) -> Image.Image:
    width, height = parts[0].size
    strip = Image.new("RGB", (len(parts) * (width + gap) + gap, height + line + gap), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(20)
    for number, (part, caption) in enumerate(zip(parts, captions, strict=True)):
        left = gap + number * (width + gap)
        strip.paste(part, (left, line))
        draw.text((left, line / 2), caption, fill="black", font=font, anchor="lm")
    return strip


def write_plot(path: Path, rows: list[dict[str, Any]], options: argparse.Namespace, device: torch.device) -> None:
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    measured = [row for row in rows if row["r"] is not None]
    r = [row["r"] for row in measured]
    speed = [row["speedup"] for row in measured]
    spread = [
        [row["speedup"] - row["speedup_lowest"] for row in measured],
        [row["speedup_highest"] - row["speedup"] for row in measured],
    ]
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.axhline(1, color="0.7", linewidth=1)
    axes.plot(r, [row["flops_ratio"] for row in measured], "--", color="0.45", label="fewer operations")
    axes.errorbar(r, speed, spread, marker="o", capsize=3, color="C0", label="faster (median, lowest to highest)")
    for x, y, row in zip(r, speed, measured, strict=True):
        axes.annotate(f"{row['tokens']} tokens", (x, y), (6, -13), textcoords="offset points", fontsize=8, color="0.3")
    axes.set(xlabel="r, tokens removed in each block", ylabel="times the unpatched model", xticks=r)
    axes.set_title(f"{options.model}, {options.method}, {describe(device)}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
