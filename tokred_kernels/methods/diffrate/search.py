# SPDX-License-Identifier: MIT
"""DiffRate's search: learn how many tokens each block keeps, for a given number of operations."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred_kernels import flops
from tokred_kernels.backends import prepare
from tokred_kernels.checks import check_count, check_flag, check_real, shown
from tokred_kernels.files import replace_json
from tokred_kernels.methods.diffrate.cost import compression_flops, kept_counts
from tokred_kernels.methods.diffrate.method import DiffRate
from tokred_kernels.models.base import model_spec
from tokred_kernels.models.reducer import reducer_of
from tokred_kernels.models.spec import PATCH_INFO, TRACE
from tokred_kernels.models.state import ForwardTrace

OP = "diffrate_search"
LAST_RATE = 0.1  # the last learning rate divided by the first, as published
LINE_SECONDS = 5.0  # between two lines of progress, if tqdm is not installed


class FoundRates(NamedTuple):
    """The result of `diffrate_search`; as a dict or a saved file, it is a `kept` for `methods.DiffRate`.

    Attributes:
        prune_kept_num: for each block, how many tokens are left after pruning, prefix tokens included.
        merge_kept_num: for each block, how many of these are left after merging.
        gflops: the model's GFLOPs per image with these counts, in the units of `flops.count`.
        target_gflops: the target of the search.
    """

    prune_kept_num: list[int]
    merge_kept_num: list[int]
    gflops: float
    target_gflops: float

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the counts as JSON, in one step, under the keys of the published compression_rate.json.

        Raises:
            OSError: the file cannot be written; an old one is unchanged.
            ValueError: a number is NaN or infinite.
        """
        replace_json(path, self._asdict())


def diffrate_search(
    model: nn.Module,
    batches: Iterable[Any] | Callable[[], Iterable[Any]],
    target_gflops: float,
    *,
    steps: int = 1000,
    lr: float = 0.01,
    flops_weight: float = 100.0,
    granularity: int = 1,
    criterion: Callable[[Any, Tensor], Tensor] = F.cross_entropy,
    group: Any = None,
    save: str | os.PathLike[str] | None = None,
    tolerance: float = 0.02,
    progress: bool = True,
) -> FoundRates:
    """Learn how many tokens each block of a trained model prunes and merges, for a number of operations (DiffRate).

    Only the counts are learned, by AdamW without weight decay, with a cosine schedule that ends at a tenth of `lr`. The
    loss is `criterion(model(images), labels) + flops_weight ((gflops - target) / target)^2`. The published code has
    5 (gmacs - target)^2 as its second term for every model size: this equals `flops_weight` 31 for DeiT-S at 2.5, and
    420 for DeiT-B at 9.2.

    Args:
        model: a vision transformer with trained weights that `patch` supports: either patched with DiffRate and without
            given counts, to train these further, or not patched, to patch it first. It can be inside
            DistributedDataParallel.
        batches: (images, labels) from a DataLoader or list, which is repeated as needed, or a function that
            returns one for each repetition. Images and labels are moved to the model's device.
        target_gflops: the GFLOPs per image to reach, in the units of `flops.count(model).gflops`: a multiply-add is two
            operations. Papers on vision transformers count it as one, so double their numbers.
        steps: the number of batches in total.
        lr: the initial learning rate of the counts' logits.
        flops_weight: the weight of the distance to the target.
        granularity: if the model is not patched, the gap between the counts that can be learned. For an MAE model,
            whose last block is frozen too, call `patch(model, "diffrate", frozen=(0, -1))` first.
        criterion: the loss of the model's output (of `logits` for outputs of transformers) and the labels.
        group: the torch.distributed process group that searches together. Each process reads its own batches, gradients
            are averaged, and all processes end with the same counts. Default: all processes, if torch.distributed is
            initialized.
        save: a path to write the result to, as JSON, for `patch(model, "diffrate", kept=path)`.
        tolerance: warn if the result differs from the target by more than this share of it.
        progress: show a progress bar on stderr, or lines if tqdm is not installed.

    Returns:
        FoundRates. The model stays patched, and evaluates with these counts.

    The search runs the model in train mode, with its dropout. Weights and their `grad` do not change. At the end, and
    after an error, every module has its previous mode, and every parameter its previous `requires_grad`; a model that
    was not patched before is unpatched after an error. Under `torch.autocast` with bfloat16, the search uses it.

    Raises:
        TypeError: a wrong type, also of a batch.
        ValueError: an unreachable target (the message gives the range), a model that is patched differently, no
            batches, or a wrong number.
        RuntimeError: called inside torch.inference_mode, where nothing can be learned.
        FloatingPointError: a loss that is NaN or infinite.
        NotImplementedError: a model that `patch` does not support, or patch dropout.
        ImportError: the model's library is too old.

    Warns:
        UserWarning: the result differs from the target by more than `tolerance`.
    """
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    _check_numbers(target_gflops=target_gflops, lr=lr, flops_weight=flops_weight, tolerance=tolerance)
    check_count(OP, "steps", steps, least=1)
    check_flag(OP, "progress", progress)
    target_gflops, flops_weight = float(target_gflops), float(flops_weight)
    if not isinstance(batches, Iterable) and not callable(batches):
        raise TypeError(f"tokred_kernels.{OP}: batches must be an iterable or a function, got {shown(batches)}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"tokred_kernels.{OP}: counts are learned by gradients; call it outside torch.inference_mode"
        )
    ours = _ensure_patched(inner, granularity)
    try:
        _check_reach(inner, target_gflops)
        if group is None and torch.distributed.is_available() and torch.distributed.is_initialized():
            group = torch.distributed.group.WORLD
        show = progress and (group is None or torch.distributed.get_rank(group) == 0)
        with _Searching(inner) as logits:
            _learn(inner, logits, _endless(batches), target_gflops, steps, lr, flops_weight, criterion, group, show)
        found = FoundRates(*kept_counts(inner), float(compression_flops(inner).detach()), float(target_gflops))
    except BaseException:
        if ours:
            getattr(inner, PATCH_INFO).remove(inner)
        raise
    if save is not None and (group is None or torch.distributed.get_rank(group) == 0):
        found.save(save)
    if abs(found.gflops - target_gflops) > tolerance * target_gflops:
        warnings.warn(
            f"tokred_kernels.{OP}: the counts found take {found.gflops:.4g} GFLOPs, and the target was "
            f"{target_gflops:.4g}; continue with the same model, or use more steps, or a higher lr or flops_weight",
            stacklevel=2,
        )
    return found


def _check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        number = check_real(OP, name, value)
        if number < 0 or (number == 0 and name in ("target_gflops", "lr")):
            least = "above 0" if name in ("target_gflops", "lr") else "0 or above"
            raise ValueError(f"tokred_kernels.{OP}: {name} must be finite and {least}, got {value}")


def _ensure_patched(model: Any, granularity: int) -> bool:
    """Patch `model` to learn its counts, unless it is so already; return whether it was patched here."""
    info = getattr(model, PATCH_INFO, None)
    if info is None:
        prepare(model)
        DiffRate(granularity=granularity).apply(model)
        return True
    if not isinstance(info.method, DiffRate) or info.method.kept is not None:
        raise ValueError(
            f'tokred_kernels.{OP}: model must not be patched, or with "{DiffRate.name}" and no counts given, got '
            f"{info}; call tokred_kernels.unpatch(model) first"
        )
    return False


def _check_reach(model: Any, target: float) -> None:
    """Raise unless the target is between the FLOPs with the fewest tokens and with all tokens."""
    spec: Any = model_spec(model)
    if getattr(getattr(model, "patch_drop", None), "prob", 0) > 0:
        raise NotImplementedError(
            f"tokred_kernels.{OP}: counts are learned on all tokens, and the model's patch dropout leaves fewer; set "
            "model.patch_drop = torch.nn.Identity()"
        )
    fewest = list(accumulate((min(block.prune_ddp.least, block.merge_ddp.least) for block in spec.blocks), min))
    everything = [spec.num_patches + spec.num_prefix] * len(fewest)
    low, high = (_gflops_without_selection(model, tokens) for tokens in (fewest, everything))
    if not low <= target <= high:
        raise ValueError(
            f"tokred_kernels.{OP}: target_gflops must be from {low:.4g}, with the fewest tokens in each block, to "
            f"{high:.4g}, with all of them, got {target:.4g} (a multiply-add counts as two operations)"
        )


def _gflops_without_selection(model: Any, tokens: list[int]) -> float:
    counted = flops.count(model, tokens=tokens)
    entering = [int(number) for number in counted.tokens[:-1]]
    spec = model_spec(model)
    selection = [
        reducer_of(block).selection_flops(number, number, block_spec)
        for block, block_spec, number in zip(spec.blocks, spec.block_specs, entering, strict=True)
    ]
    return (counted.total - sum(selection)) / 1e9


class _Searching:
    """Context of the search: train mode, and gradients only for the logits of the counts."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.modes = [(module, module.training) for module in model.modules()]
        self.flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def __enter__(self) -> list[nn.Parameter]:
        self.model.requires_grad_(False).train()
        # A frozen block has a single candidate, so the gradient of its logit is zero.
        rates = [rate for block in model_spec(self.model).blocks for rate in (block.prune_ddp, block.merge_ddp)]
        return [rate.selected_probability.requires_grad_(True) for rate in rates]

    def __exit__(self, *_: object) -> None:
        # The last trace keeps the autograd graph of the masked tokens alive.
        setattr(model_spec(self.model).model, TRACE, ForwardTrace())
        for module, mode in self.modes:
            module.training = mode
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)


def _learn(
    model: Any,
    logits: list[nn.Parameter],
    batches: Iterator[Any],
    target: float,
    steps: int,
    lr: float,
    flops_weight: float,
    criterion: Callable[[Any, Tensor], Tensor],
    group: Any,
    show: bool,
) -> None:
    device = next(model.parameters()).device
    # Copies: AdamW reads `grad`, and the `grad` of the model's parameters must not change.
    learned = [parameter.detach().clone() for parameter in logits]
    if group is not None:
        first = torch.distributed.get_global_rank(group, 0)
        for parameter in learned:
            torch.distributed.broadcast(parameter, first, group=group)
        _write(logits, learned)
    optimizer = torch.optim.AdamW(learned, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=LAST_RATE * lr)
    report = _Report(steps, show)
    with report, torch.enable_grad():
        for step in range(steps):
            images, labels = _batch(next(batches), step)
            outputs = model(images.to(device))
            loss = criterion(getattr(outputs, "logits", outputs), labels.to(device))
            gflops = compression_flops(model)
            total = loss + flops_weight * (gflops / target - 1).square()
            grads = torch.autograd.grad(total, logits, allow_unused=True)
            flat = torch.cat(
                [
                    (torch.zeros_like(own) if grad is None else grad).flatten().float()
                    for own, grad in zip(logits, grads, strict=True)
                ]
            )
            # A NaN of one process reaches the mean, so all processes stop.
            flat = torch.cat([flat, loss.detach().float().reshape(1)])
            if group is not None:
                torch.distributed.all_reduce(flat, group=group)
                flat /= torch.distributed.get_world_size(group)
            if not flat.isfinite().all():
                raise FloatingPointError(
                    f"tokred_kernels.{OP}: the loss and its gradients must be finite, got a loss of {float(flat[-1])} "
                    f"in step {step}; look at the images and the weights"
                )
            for own, grad in zip(learned, flat[:-1].split([own.numel() for own in learned]), strict=True):
                own.grad = grad.to(own.dtype)
            optimizer.step()
            schedule.step()
            _write(logits, learned)
            report.update(step + 1, float(gflops.detach()), float(flat[-1]))


@torch.no_grad()
def _write(logits: list[nn.Parameter], learned: list[Tensor]) -> None:
    for parameter, value in zip(logits, learned, strict=True):
        parameter.copy_(value)


def _endless(batches: Any) -> Iterator[Any]:
    """Iterate over the batches, again and again."""
    first = True
    while True:
        found = False
        for batch in batches() if callable(batches) else batches:
            found = True
            yield batch
        if not found:
            raise ValueError(
                f"tokred_kernels.{OP}: batches must give (images, labels), got "
                + ("none" if first else "no batches the second time; give a DataLoader, list or function")
            )
        first = False


def _batch(batch: Any, number: int) -> tuple[Tensor, Tensor]:
    if not (isinstance(batch, (tuple, list)) and len(batch) >= 2 and all(isinstance(p, Tensor) for p in batch[:2])):
        raise TypeError(
            f"tokred_kernels.{OP}: batches must give (images, labels), got {type(batch).__name__} as batch {number}"
        )
    return batch[0], batch[1]


class _Report:
    """A progress bar on stderr, or lines if tqdm is not installed."""

    def __init__(self, steps: int, show: bool) -> None:
        self.steps = steps
        self.show = show
        self.bar: Any = None
        self.printed = time.monotonic()

    def __enter__(self) -> None:
        if not self.show:
            return
        try:
            from tqdm import tqdm  # noqa: PLC0415  (optional)
        except ImportError:
            return
        self.bar = tqdm(total=self.steps, desc="search", unit="batch", leave=False)

    def update(self, step: int, gflops: float, loss: float) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"{gflops:.4g} GFLOPs, loss {loss:.3f}", refresh=False)
            self.bar.update()
        elif self.show and time.monotonic() - self.printed >= LINE_SECONDS:
            self.printed = time.monotonic()
            print(f"search: batch {step} of {self.steps}, {gflops:.4g} GFLOPs, loss {loss:.3f}", file=sys.stderr)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
