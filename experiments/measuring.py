# SPDX-License-Identifier: MIT
"""How long a model takes, and how much memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

MIN_SAMPLE = 0.1  # seconds that one timing lasts at least, so that clocks and launches do not show
MIN_ROUNDS = 3
ROUNDS = 9  # of `speeds`, where there is time for them


def in_turns(
    model: nn.Module,
    x: Tensor,
    variants: list[Callable[[], AbstractContextManager[Any]]],
    rounds: int,
    seconds: float,
    progress: tqdm,
) -> list[list[float]]:
    """Seconds a call of model(x) inside each variant, in each round: all in turn, so that all meet the same machine."""
    times: list[list[float]] = [[] for _ in variants]
    repeats = max(1, math.ceil(MIN_SAMPLE / timed(model, x, 1)))
    begin = time.perf_counter()
    for number in range(rounds):
        if number >= MIN_ROUNDS and (time.perf_counter() - begin) * (number + 1) / number > seconds:
            break
        order = range(len(variants)) if number % 2 == 0 else range(len(variants) - 1, -1, -1)
        for index in order:
            with variants[index]():
                times[index].append(timed(model, x, repeats))
            progress.update()
    return times


@torch.inference_mode()
def speeds(forwards: Sequence[Callable[[Tensor], Any]], images: Tensor, seconds: int) -> list[dict[str, float]]:
    """Images a second of each on one batch, and times the first's, as medians, in no more than so many seconds."""
    stage: Any = nn.Module()

    @contextmanager
    def on_stage(forward: Callable[[Tensor], Any]) -> Iterator[None]:
        stage.forward = forward
        yield

    variants = [partial(on_stage, forward) for forward in forwards]
    with tqdm(total=ROUNDS * len(variants), desc="timing", unit="sample", leave=False) as progress, variants[0]():
        times = in_turns(stage, images, variants, ROUNDS, seconds, progress)
    return [
        {
            "images_per_s": len(images) / statistics.median(own),
            "speedup": statistics.median(base / mine for base, mine in zip(times[0], own, strict=True)),
        }
        for own in times
    ]


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
