# SPDX-License-Identifier: MIT
"""A small ViT on handwritten digits, and the same with fewer tokens by each method: accuracy and speed.

    python experiments/train_digits.py
    python experiments/train_digits.py --method evit --seeds 5

Trains a vision transformer with all tokens on scikit-learn's digits, in 64 patches. Then each method starts from its
weights, as in the method's paper: ToMe without training; EViT and DynamicViT with fine-tuning; DiffRate with a search
for the number of tokens of each block, and fine-tuning. The plain model is trained for as much longer. LookupViT is
trained from scratch with the same schedule, and tested at each of its grids. With --seeds, everything is repeated, and
the table has the means. Prints a table, and writes it into --out with a plot of accuracy against operations and the
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

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for benchmarks

import torch
import torch.nn.functional as F
from drawing import plot_accuracy
from measuring import choose_device, describe, make_folder, positive, speeds
from pictures import SIDE, SOURCES, Pictures, load, varied
from scores import LEGEND, Variant, evaluate, markdown, over_seeds
from torch import Tensor, nn
from tqdm import tqdm

import tokred_kernels as tk
from tokred_kernels.files import replace_text
from tokred_kernels.models.imports import import_with_torchvision

METHODS = ("none", "tome", "dynamicvit", "evit", "diffrate", "lookupvit")
ALL = "all"
PATCH = 4
TOKENS = (SIDE // PATCH) ** 2
HEAD_WIDTH = 32
POSITION_STD = 0.2
TUNED_BY = 0.25  # learning rate of fine-tuning relative to training
WEIGHT_DECAY = 0.05
SMOOTHING = 0.1  # label smoothing
WARM_UP = 0.1  # share of all steps
FEWER = 0.32  # share of the operations that DiffRate must save; the others save about as much
QUICK: dict[str, Any] = {"epochs": 1, "tuning": 1, "width": 32, "depth": 3, "search": 4, "seconds": 1}

# How many tokens each method removes. Blocks are counted from 0.
TOME_SHARE = 0.105  # share of all tokens in each of 6 blocks
STAGES = (1 / 6, 1 / 2)  # of the depth: the blocks in which EViT and DynamicViT reduce tokens
EVIT_KEEP = 0.7
DYNAMICVIT_KEEP = (0.75, 0.53)
GRIDS = ((2, 2), (3, 3), (4, 4), (5, 5))  # LookupViT's compressed tokens; each step draws one
RATIO_WEIGHT, DISTILLATION_WEIGHT = 2.0, 0.5  # DynamicViT's weights of the losses
# As published, DynamicViT's predictors first learn alone, for this share of the steps, and then faster than the rest.
# A dropped token with the highest score makes the policy's gradient huge: without clipping, some seeds diverge.
ALONE, FASTER, GRADIENT_BOUND = 1 / 6, 4.0, 1.0
SEARCH_RATE = 0.05  # higher than published, for fewer steps


class Budget(NamedTuple):
    """Number of epochs, and the highest learning rate."""

    epochs: int
    rate: float


def main(arguments: list[str] | None = None) -> None:
    start = time.perf_counter()
    options = parse(arguments)
    make_folder(options.out)
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
    """Parse a learning rate, for argparse."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text!r}")
    return number


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--method", choices=(*METHODS, ALL), default=ALL, help="compared with the plain model (%(default)s)"
    )
    parser.add_argument("--data", choices=SOURCES, default="digits", help="data set (%(default)s)")
    parser.add_argument("--width", type=positive, default=64, help="embedding dimension (%(default)s)")
    parser.add_argument("--depth", type=positive, default=6, help="number of blocks (%(default)s)")
    parser.add_argument(
        "--positions", choices=("random", "waves"), default="random", help="initial positions of the ViT (%(default)s)"
    )
    parser.add_argument("--epochs", type=positive, default=30, help="epochs with all tokens (%(default)s)")
    parser.add_argument("--rate", type=learning_rate, default=2e-3, help="highest learning rate (%(default)s)")
    parser.add_argument("--tuning", type=positive, default=10, help="epochs of fine-tuning (%(default)s)")
    parser.add_argument("--search", type=positive, default=100, help="steps of DiffRate's search (%(default)s)")
    parser.add_argument("--batch", type=positive, default=64, help="batch size (%(default)s)")
    parser.add_argument("--seconds", type=positive, default=20, help="time limit of the timings (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="first seed (%(default)s)")
    parser.add_argument("--seeds", type=positive, default=1, help="number of seeds (%(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one epoch, as a test")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    if options.seed < 0:
        parser.error(f"--seed must be at least 0, got {options.seed}")
    if options.width % HEAD_WIDTH:
        parser.error(f"--width must be a multiple of {HEAD_WIDTH}, got {options.width}")
    if len(set(stages(options.depth))) < len(STAGES):
        parser.error(f"--depth must be at least 3, so that two blocks can reduce tokens, got {options.depth}")
    return options


def prepared(data: Pictures, options: argparse.Namespace) -> list[Variant]:
    """Return the rows of the plain model and of the chosen methods, trained from one seed."""
    begun = make(options, data.classes, data.train.device)
    train(begun, data, options, Budget(options.epochs, options.rate), "training")
    methods = METHODS if options.method == ALL else tuple(dict.fromkeys(("none", options.method)))
    return [
        variant
        for method in methods
        for variant in variants(method, PREPARE[method](copy.deepcopy(begun), begun, data, options))
    ]


def make(options: argparse.Namespace, classes: int, device: torch.device) -> nn.Module:
    """Return a new ViT. Its initial weights are larger than timm's, which suit longer training.

    Initial positions are random, as usual, or for a fair comparison the waves of LookupViT.
    """
    torch.manual_seed(options.seed)
    model = import_with_torchvision("timm").models.vision_transformer.VisionTransformer(
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
        model.pos_embed.data[:, 1:] = make_lookupvit(options, classes).pos_embed
    return model.to(device)


def make_lookupvit(options: argparse.Namespace, classes: int) -> tk.nn.LookupViT:
    """Return a new LookupViT."""
    return tk.nn.LookupViT(
        img_size=SIDE,
        patch_size=PATCH,
        in_chans=1,
        num_classes=classes,
        embed_dim=options.width,
        depth=options.depth,
        num_heads=options.width // HEAD_WIDTH,
        grid=GRIDS[-1],
        grids=GRIDS,
    )


def fine_tuning(options: argparse.Namespace) -> Budget:
    """Return the budget of every method, and of the plain model, after the training with all tokens."""
    return Budget(options.tuning, TUNED_BY * options.rate)


def stages(depth: int) -> tuple[int, ...]:
    """Return the blocks in which EViT and DynamicViT reduce tokens."""
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
    """Train from scratch, with the schedule of the ViT."""
    torch.manual_seed(options.seed)
    model = make_lookupvit(options, data.classes).to(data.train.device)

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
    """Yield augmented training pictures in batches. Order and augmentation depend only on the seed and the epoch."""
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
    """Train, and return the model in eval mode.

    `before` is called before each step. `fresh` is a new part of the model, without trained weights.
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
    """Return parameter groups with the share of the steps after which they learn, and a factor of the rate."""
    if fresh is None:
        return [{"params": list(model.parameters()), "from": 0.0, "faster": 1.0}]
    new = list(fresh.parameters())
    old = [parameter for parameter in model.parameters() if all(parameter is not one for one in new)]
    return [{"params": old, "from": ALONE, "faster": 1.0}, {"params": new, "from": 0.0, "faster": FASTER}]


def variants(method: str, model: nn.Module) -> list[Variant]:
    """Return the rows of a method: one, or one for each grid of LookupViT."""
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
