# SPDX-License-Identifier: MIT
"""A small ViT on handwritten digits, and the same with fewer tokens by each method: how good, how fast.

    python experiments/train_digits.py
    python experiments/train_digits.py --method evit --seeds 5

Trains a vision transformer on scikit-learn's scans, a patch for each of their 64 pixels, with all its tokens. Every
method then starts from there, as its paper does: ToMe is put in, and nothing trained; EViT and DynamicViT are
fine-tuned; DiffRate searches how many tokens each block keeps, its weights as they are, and is fine-tuned then. The
model with all tokens is trained as much longer as the others are fine-tuned. LookupViT, another model, is trained from
its own beginnings by the same schedule, and tested with each of its compressed grids. --seeds 5 does all of that five
times, and gives the mean. Prints a table, and writes it into --out, with a plot of accuracy against operations and the
figures as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate_vit import _positive as positive
from accelerate_vit import choose_device, describe
from drawing import plot_accuracy
from measuring import speeds
from pictures import SIDE, SOURCES, Pictures, load, varied
from scores import LEGEND, Variant, evaluate, markdown, over_seeds
from torch import Tensor, nn
from tqdm import tqdm

import tokred_kernels as tk
from tokred_kernels.files import replace_text
from tokred_kernels.nn.lookupvit_positions import smooth_positions

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for benchmarks.harness
from benchmarks.harness.torchvision_shim import import_library

METHODS = ("none", "tome", "dynamicvit", "evit", "diffrate", "lookupvit")
ALL = "all"
PATCH = 4
TOKENS = (SIDE // PATCH) ** 2
HEAD_WIDTH = 32
POSITION_STD = 0.2
TUNED_BY = 0.25  # of the learning rate, when fine-tuning
WEIGHT_DECAY = 0.05
SMOOTHING = 0.1  # of labels
WARM_UP = 0.1  # of all steps
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
# Its predictors learn alone for this share of the steps, as published, and then by so much faster than the rest. The
# gradient of a policy is huge where a dropped token outscores all that are kept: without a bound some seeds diverge.
ALONE, FASTER, GRADIENT_BOUND = 1 / 6, 4.0, 1.0
SEARCH_RATE = 0.05  # more than published, for fewer steps


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
    runs: list[list[dict[str, Any]]] = []
    measured: list[dict[str, float]] = []
    for seed in range(options.seed, options.seed + options.seeds):
        own = argparse.Namespace(**{**vars(options), "seed": seed})
        data = load(own.data, seed, device)
        print(
            f"seed {seed}: {len(data.train)} {own.data} to train on, {len(data.test)} to test, {TOKENS} tokens, "
            f"{describe(device)}"
        )
        found = prepared(data, own)
        runs.append([evaluate(variant, data) for variant in found])
        if not measured:
            measured = speeds([variant.forward for variant in found], data.test[: own.batch], own.seconds)
    rows = [{**row, **speed} for row, speed in zip(over_seeds(runs), measured, strict=True)]
    text = markdown(rows)
    print(f"\n{text}\n\n{LEGEND}")
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    took = round(time.perf_counter() - start)
    machine = {"device": describe(device), "torch": torch.__version__, "took_seconds": took}
    report = {**settings, **machine, "rows": rows}
    replace_text(options.out / f"{options.data}.json", json.dumps(report, indent=1) + "\n")
    replace_text(options.out / f"{options.data}.md", text + "\n")
    plot_accuracy(options.out / f"{options.data}.png", rows)
    print(f"\nIn {options.out}/ after {took} s: {options.data}.png, .md, .json")


def learning_rate(text: str) -> float:
    """A rate of learning, for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, and finite, got {text!r}")
    return number


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
    parser.add_argument("--rate", type=learning_rate, default=2e-3, help="of learning, at most (%(default)s)")
    parser.add_argument("--tuning", type=positive, default=10, help="epochs of fine-tuning (%(default)s)")
    parser.add_argument("--search", type=positive, default=100, help="steps of DiffRate's search (%(default)s)")
    parser.add_argument("--batch", type=positive, default=64, help="digits at once (%(default)s)")
    parser.add_argument("--seconds", type=positive, default=20, help="of timing, at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first one (%(default)s)")
    parser.add_argument("--seeds", type=positive, default=1, help="how many, one after another (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU when there is one)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where to write (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and an epoch: to see whether it runs")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed must be at least 0, got {options.seed}")
    if options.width % HEAD_WIDTH:
        parser.error(f"--width must be a multiple of {HEAD_WIDTH}, got {options.width}")
    if len(set(stages(options.depth))) < len(STAGES):
        parser.error(f"--depth must be at least 3, for two blocks that reduce tokens, got {options.depth}")
    return options


def prepared(data: Pictures, options: argparse.Namespace) -> list[Variant]:
    """The rows of the plain model and of every method that is asked for, trained from one seed."""
    begun = make(options, data.classes, data.train.device)
    train(begun, data, options, Budget(options.epochs, options.rate), "training")
    methods = METHODS if options.method == ALL else tuple(dict.fromkeys(("none", options.method)))
    return [
        variant
        for method in methods
        for variant in variants(method, PREPARE[method](copy.deepcopy(begun), begun, data, options))
    ]


def make(options: argparse.Namespace, classes: int, device: torch.device) -> nn.Module:
    """A ViT from its seed. Its weights begin larger than timm's, which are made for longer training.

    Positions begin at random, as a ViT's do, or, to compare with equal starts, as the waves that LookupViT's begin as.
    """
    torch.manual_seed(options.seed)
    model = import_library("timm").models.vision_transformer.VisionTransformer(
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


def fine_tuning(options: argparse.Namespace) -> Budget:
    """What every method has after the model with all tokens was trained, and that model too."""
    return Budget(options.tuning, TUNED_BY * options.rate)


def stages(depth: int) -> tuple[int, ...]:
    """The blocks before, or in, which EViT and DynamicViT reduce."""
    return tuple(max(1, round(share * depth)) for share in STAGES)


def plain(model: nn.Module, begun: nn.Module, data: Pictures, options: argparse.Namespace) -> nn.Module:
    return train(model, data, options, fine_tuning(options), "all tokens")


def tome(model: nn.Module, begun: nn.Module, data: Pictures, options: argparse.Namespace) -> nn.Module:
    removed = round(TOME_SHARE * TOKENS * 6 / options.depth)
    return tk.patch(plain(model, begun, data, options), "tome", r=removed)


def evit(model: nn.Module, begun: nn.Module, data: Pictures, options: argparse.Namespace) -> nn.Module:
    tk.patch(model, "evit", layers=stages(options.depth), keep_rate=EVIT_KEEP)

    def schedule(step: int, steps: int) -> None:
        rate = tk.nn.cosine_keep_rate(step, warmup=0, total=max(steps // 2, 1), base=EVIT_KEEP)
        tk.set_keep_rate(model, rate)

    return train(model, data, options, fine_tuning(options), "EViT", before=schedule)


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

    return train(model, data, options, fine_tuning(options), "DynamicViT", loss=loss, fresh=model.score_predictor)


def diffrate(model: nn.Module, begun: nn.Module, data: Pictures, options: argparse.Namespace) -> nn.Module:
    target = (1 - FEWER) * tk.flops.count(model).gflops
    batches = list(shuffled(data, options, 0))
    found = tk.diffrate_search(model.eval(), batches, target, steps=options.search, lr=SEARCH_RATE)
    found.save(options.out / f"diffrate-{options.seed}.json")
    tk.unpatch(model)
    tk.patch(model, "diffrate", kept=found._asdict())
    return train(model, data, options, fine_tuning(options), "DiffRate")


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

    for budget in (Budget(options.epochs, options.rate), fine_tuning(options)):
        train(model, data, options, budget, "LookupViT", loss=loss)
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
    fresh: nn.Module | None = None,
) -> nn.Module:
    """Train for some epochs; then the model is in eval mode.

    `before` is called before each step. `fresh` is the part of the model that has learned nothing yet.
    """
    torch.manual_seed(options.seed)
    model.train()
    optimizer = torch.optim.AdamW(groups(model, fresh), budget.rate, weight_decay=WEIGHT_DECAY)
    steps = budget.epochs * math.ceil(len(data.train) / options.batch)
    progress = tqdm(total=steps, desc=f"{title}, seed {options.seed}", unit="step", leave=False)
    step = 0
    for epoch in range(budget.epochs):
        for images, labels in shuffled(data, options, epoch):
            warmed, done = (step + 1) / (WARM_UP * steps), step / steps
            for group in optimizer.param_groups:
                rate = group["faster"] * budget.rate if done >= group["from"] else 0.0
                group["lr"] = rate * min(warmed, (1 + math.cos(math.pi * done)) / 2)
            if before is not None:
                before(step, steps)
            if loss is None:
                value = F.cross_entropy(model(images), labels, label_smoothing=SMOOTHING)
            else:
                value = loss(images, labels)
            optimizer.zero_grad()
            value.backward()
            if fresh is not None:
                for group in optimizer.param_groups:
                    nn.utils.clip_grad_norm_(group["params"], GRADIENT_BOUND)
            optimizer.step()
            step += 1
            progress.update()
            progress.set_postfix(loss=f"{value.item():.3f}")
    progress.close()
    return model.eval()


def groups(model: nn.Module, fresh: nn.Module | None) -> list[dict[str, Any]]:
    """A model's parameters for an optimizer: from which share of the steps on they learn, and how much faster."""
    if fresh is None:
        return [{"params": list(model.parameters()), "from": 0.0, "faster": 1.0}]
    new = list(fresh.parameters())
    old = [parameter for parameter in model.parameters() if all(parameter is not one for one in new)]
    return [{"params": old, "from": ALONE, "faster": 1.0}, {"params": new, "from": 0.0, "faster": FASTER}]


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


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
