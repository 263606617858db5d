# SPDX-License-Identifier: MIT
"""A small ViT on handwritten digits, and the same with fewer tokens by each method: how good, how fast.

    python examples/train_digits.py
    python examples/train_digits.py --method evit

Trains a vision transformer on scikit-learn's scans, a patch for each of their 64 pixels, with all its tokens. Every
method then starts from there, as its paper does: ToMe is put in, and nothing trained; EViT and DynamicViT are
fine-tuned; DiffRate searches how many tokens each block keeps, its weights as they are, and is fine-tuned then. The
model with all tokens is trained as much longer as the others are fine-tuned. LookupViT, another model, is trained from
its own beginnings by the same schedule, and tested with each of its compressed grids. Prints a table, and writes it
into --out, with a plot of accuracy against operations and the figures as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate_vit import _positive as positive
from accelerate_vit import choose_device, describe
from drawing import plot_accuracy
from measuring import in_turns
from pictures import SIDE, SOURCES, Pictures, load, varied
from torch import Tensor, nn
from tqdm import tqdm

import tokred_kernels as tk
from tokred_kernels.nn.lookupvit_positions import smooth_positions
from tokred_kernels.patch.timm_import import import_timm

METHODS = ("none", "tome", "dynamicvit", "evit", "diffrate", "lookupvit")
ALL = "all"
PATCH = 4
TOKENS = (SIDE // PATCH) ** 2
HEAD_WIDTH = 32
POSITION_STD = 0.2
LEARNING_RATE, FINE_TUNING_RATE = 2e-3, 5e-4
WEIGHT_DECAY = 0.05
SMOOTHING = 0.1  # of labels
WARM_UP = 0.1  # of all steps
ROUNDS = 9  # of timing
FEWER = 0.32  # of the operations: what DiffRate is asked to save; the others are set to save as much, or nearly
QUICK: dict[str, Any] = {"epochs": 1, "tuning": 1, "width": 32, "depth": 3, "search": 4, "seconds": 1}

# What each method removes, by the depth of the model; together with the model's width these make the operations.
# A block's index is counted from 0.
TOME_SHARE = 0.105  # of all tokens, in each of 6 blocks
STAGES = (1 / 6, 1 / 2)  # of the depth: where EViT and DynamicViT reduce
EVIT_KEEP = 0.7
DYNAMICVIT_KEEP = (0.75, 0.53)
GRIDS = ((2, 2), (3, 3), (4, 4), (5, 5))  # of LookupViT's compressed tokens; one is drawn for each step
RATIO_WEIGHT, DISTILLATION_WEIGHT = 2.0, 0.5  # of the losses, as DynamicViT has them
SEARCH_RATE = 0.05  # more than published, for fewer steps


class Variant(NamedTuple):
    """A row of the table: a model, or one way to run it."""

    name: str
    forward: Callable[[Tensor], Tensor]
    tokens: tuple[float, ...]
    gflops: float


class Budget(NamedTuple):
    """How long to train, and how fast to learn at most."""

    epochs: int
    rate: float


def main(arguments: list[str] | None = None) -> None:
    start = time.perf_counter()
    options = parse(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {options.out}: cannot write there ({error.strerror})") from None
    device = choose_device(options.device)
    data = load(options.data, options.seed, device)
    print(
        f"{len(data.train)} {options.data} to train on, {len(data.test)} to test, {TOKENS} tokens, {describe(device)}"
    )

    begun = make(options, data.classes, device)
    train(begun, data, options, Budget(options.epochs, LEARNING_RATE), "training")
    methods = METHODS if options.method == ALL else tuple(dict.fromkeys(("none", options.method)))
    found = []
    for method in methods:
        model = PREPARE[method](copy.deepcopy(begun), begun, data, options)
        found += variants(method, model)
    rows = [evaluate(variant, data) for variant in found]
    for row, speed in zip(rows, timings(found, data, options), strict=True):
        row.update(speed)
    text = markdown(rows)
    print(f"\n{text}\n\n{LEGEND}")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    took = round(time.perf_counter() - start)
    machine = {"device": describe(device), "torch": torch.__version__, "took_seconds": took}
    report = {**settings, **machine, "rows": rows}
    (options.out / f"{options.data}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / f"{options.data}.md").write_text(text + "\n")
    plot_accuracy(options.out / f"{options.data}.png", rows)
    print(f"\nIn {options.out}/ after {took} s: {options.data}.png, .md, .json")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--method", choices=(*METHODS, ALL), default=ALL, help="beside the plain model (%(default)s)")
    parser.add_argument("--data", choices=SOURCES, default="digits", help="what is classified (%(default)s)")
    parser.add_argument("--width", type=positive, default=64, help="channels of the transformer (%(default)s)")
    parser.add_argument("--depth", type=positive, default=6, help="its blocks (%(default)s)")
    parser.add_argument(
        "--positions", choices=("random", "waves"), default="random", help="what the ViT's begin as (%(default)s)"
    )
    parser.add_argument("--epochs", type=positive, default=30, help="of training with all tokens (%(default)s)")
    parser.add_argument("--tuning", type=positive, default=10, help="epochs of fine-tuning (%(default)s)")
    parser.add_argument("--search", type=positive, default=100, help="steps of DiffRate's search (%(default)s)")
    parser.add_argument("--batch", type=positive, default=64, help="digits at once (%(default)s)")
    parser.add_argument("--seconds", type=positive, default=20, help="of timing, at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU when there is one)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where to write (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and an epoch: to see whether it runs")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    if options.width % HEAD_WIDTH:
        parser.error(f"--width must be a multiple of {HEAD_WIDTH}, got {options.width}")
    if len(set(stages(options.depth))) < len(STAGES):
        parser.error(f"--depth must be at least 3, for two blocks that reduce tokens, got {options.depth}")
    return options


def make(options: argparse.Namespace, classes: int, device: torch.device) -> nn.Module:
    """A ViT from its seed. Its weights begin larger than timm's, which are made for longer training.

    Positions begin at random, as a ViT's do, or, to compare with equal starts, as the waves that LookupViT's begin as.
    """
    torch.manual_seed(options.seed)
    model = import_timm().models.vision_transformer.VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        in_chans=1,
        num_classes=classes,
        embed_dim=options.width,
        depth=options.depth,
        num_heads=options.width // HEAD_WIDTH,
    )
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    for learned in (model.pos_embed, model.cls_token):
        nn.init.normal_(learned, std=POSITION_STD)
    if options.positions == "waves":
        model.pos_embed.data[:, 1:] = smooth_positions(model.patch_embed.grid_size, options.width)
    return model.to(device)


def stages(depth: int) -> tuple[int, ...]:
    """The blocks before, or in, which EViT and DynamicViT reduce."""
    return tuple(max(1, round(share * depth)) for share in STAGES)


def plain(model: nn.Module, begun: nn.Module, data: Pictures, options: argparse.Namespace) -> nn.Module:
    return train(model, data, options, Budget(options.tuning, FINE_TUNING_RATE), "all tokens")


def tome(model: nn.Module, begun: nn.Module, data: Pictures, options: argparse.Namespace) -> nn.Module:
    removed = round(TOME_SHARE * TOKENS * 6 / options.depth)
    return tk.patch(plain(model, begun, data, options), "tome", r=removed)


def evit(model: nn.Module, begun: nn.Module, data: Pictures, options: argparse.Namespace) -> nn.Module:
    tk.patch(model, "evit", layers=stages(options.depth), keep_rate=EVIT_KEEP)

    def schedule(step: int, steps: int) -> None:
        rate = tk.nn.cosine_keep_rate(step, warmup=0, total=max(steps // 2, 1), base=EVIT_KEEP)
        tk.set_keep_rate(model, rate)

    return train(model, data, options, Budget(options.tuning, FINE_TUNING_RATE), "EViT", before=schedule)


def dynamicvit(model: nn.Module, begun: nn.Module, data: Pictures, options: argparse.Namespace) -> nn.Module:
    teacher = copy.deepcopy(begun).eval().requires_grad_(False)
    tk.patch(model, "dynamicvit", layers=stages(options.depth), keep=DYNAMICVIT_KEEP)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        tokens = model.forward_features(images)
        logits = model.forward_head(tokens)
        expected = teacher.forward_features(images)
        decisions = model.token_decisions
        predictions, distance = tk.nn.distillation_loss(
            logits, teacher.forward_head(expected), tokens[:, 1:], expected[:, 1:], decisions[-1]
        )
        return (
            F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
            + RATIO_WEIGHT * tk.nn.ratio_loss(decisions, DYNAMICVIT_KEEP)
            + DISTILLATION_WEIGHT * (predictions + distance)
        )

    return train(model, data, options, Budget(options.tuning, FINE_TUNING_RATE), "DynamicViT", loss=loss)


def diffrate(model: nn.Module, begun: nn.Module, data: Pictures, options: argparse.Namespace) -> nn.Module:
    target = (1 - FEWER) * tk.flops.count(model).gflops
    batches = list(shuffled(data, options, 0))
    found = tk.diffrate_search(model.eval(), batches, target, steps=options.search, lr=SEARCH_RATE)
    found.save(options.out / "diffrate.json")
    tk.unpatch(model)
    tk.patch(model, "diffrate", kept=found._asdict())
    return train(model, data, options, Budget(options.tuning, FINE_TUNING_RATE), "DiffRate")


def lookupvit(model: nn.Module, begun: nn.Module, data: Pictures, options: argparse.Namespace) -> nn.Module:
    """From its own beginnings, with the same schedule as the ViT: it has no other model's weights."""
    torch.manual_seed(options.seed)
    model = tk.nn.LookupViT(
        img_size=SIDE,
        patch_size=PATCH,
        in_chans=1,
        num_classes=data.classes,
        embed_dim=options.width,
        depth=options.depth,
        num_heads=options.width // HEAD_WIDTH,
        grid=GRIDS[-1],
        grids=GRIDS,
    ).to(data.train.device)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return tk.nn.lookup_loss(model(images), labels, label_smoothing=SMOOTHING)

    for epochs, rate in ((options.epochs, LEARNING_RATE), (options.tuning, FINE_TUNING_RATE)):
        train(model, data, options, Budget(epochs, rate), "LookupViT", loss=loss)
    return model


Prepare = Callable[[nn.Module, nn.Module, Pictures, argparse.Namespace], nn.Module]
PREPARE: dict[str, Prepare] = {
    "none": plain,
    "tome": tome,
    "dynamicvit": dynamicvit,
    "evit": evit,
    "diffrate": diffrate,
    "lookupvit": lookupvit,
}


def shuffled(data: Pictures, options: argparse.Namespace, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The training digits in batches, varied and in an order that hang on the epoch's number alone."""
    generator = torch.Generator().manual_seed(options.seed + epoch)
    order = torch.randperm(len(data.train), generator=generator).to(data.train.device)
    for index in order.split(options.batch):
        yield varied(data.train[index], generator), data.train_labels[index]


def train(
    model: nn.Module,
    data: Pictures,
    options: argparse.Namespace,
    budget: Budget,
    title: str,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    before: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Train for some epochs; then the model is in eval mode. `before` is called before each step."""
    torch.manual_seed(options.seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), budget.rate, weight_decay=WEIGHT_DECAY)
    steps = budget.epochs * math.ceil(len(data.train) / options.batch)
    progress = tqdm(total=steps, desc=title, unit="step", leave=False)
    step = 0
    for epoch in range(budget.epochs):
        for images, labels in shuffled(data, options, epoch):
            warmed, done = (step + 1) / (WARM_UP * steps), step / steps
            for group in optimizer.param_groups:
                group["lr"] = budget.rate * min(warmed, (1 + math.cos(math.pi * done)) / 2)
            if before is not None:
                before(step, steps)
            if loss is None:
                value = F.cross_entropy(model(images), labels, label_smoothing=SMOOTHING)
            else:
                value = loss(images, labels)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            step += 1
            progress.update()
            progress.set_postfix(loss=f"{value.item():.3f}")
    progress.close()
    return model.eval()


def variants(method: str, model: nn.Module) -> list[Variant]:
    """The rows of a method: one, or one for each compressed grid."""
    if isinstance(model, tk.nn.LookupViT):
        return [
            Variant(
                f"{method} {down}x{across}",
                partial(model, grid=(down, across)),
                (TOKENS, down * across),
                tk.nn.lookupvit_flops(model, grid=(down, across)).gflops,
            )
            for down, across in GRIDS
        ]
    counted = tk.flops.count(model)
    return [Variant(method, model.forward, counted.tokens, counted.gflops)]


@torch.inference_mode()
def evaluate(variant: Variant, data: Pictures) -> dict[str, Any]:
    """How many test pictures it names, with how many tokens and operations."""
    right = (variant.forward(data.test).argmax(1) == data.test_labels).sum().item()
    return {
        "method": variant.name,
        "accuracy": 100 * right / len(data.test),
        "tokens": variant.tokens,
        "gflops": variant.gflops,
    }


@torch.inference_mode()
def timings(found: list[Variant], data: Pictures, options: argparse.Namespace) -> list[dict[str, float]]:
    """Images a second of each on a batch of test pictures."""
    images = data.test[: options.batch]
    stage: Any = nn.Module()

    @contextmanager
    def on_stage(variant: Variant) -> Iterator[None]:
        stage.forward = variant.forward
        yield

    all_in_turn = [partial(on_stage, variant) for variant in found]
    with tqdm(total=ROUNDS * len(found), desc="timing", unit="sample", leave=False) as progress, all_in_turn[0]():
        times = in_turns(stage, images, all_in_turn, ROUNDS, options.seconds, progress)
    return [
        {
            "images_per_s": len(images) / statistics.median(own),
            "speedup": statistics.median(base / mine for base, mine in zip(times[0], own, strict=True)),
        }
        for own in times
    ]


LEGEND = """Accuracy: percent of the test pictures. Tokens left: after the last block; of LookupViT the compressed ones,
beside which all others stay. GFLOPs: an image, a multiply-add being two. Faster: median over rounds, each against the
plain model in the same round."""


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table that is printed, and stands in the README."""
    first = rows[0]
    lines = [
        "| method | accuracy | change | tokens left | GFLOPs | fewer | images/s | faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        fewer = 1 - row["gflops"] / first["gflops"]
        lines.append(
            f"| {row['method']} | {row['accuracy']:.1f} % | {row['accuracy'] - first['accuracy']:+.1f} | "
            f"{row['tokens'][-1]:g} of {row['tokens'][0]:g} | {row['gflops']:.4f} | {fewer:.0%} | "
            f"{row['images_per_s']:.0f} | {row['speedup']:.2f}x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
