# SPDX-License-Identifier: MIT
"""ALGM's thresholds from data: how alike the tokens of a model's layers are."""

from __future__ import annotations

import math
import os
import re
import reprlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred_kernels.checks import check_count, check_flag, shape, shown
from tokred_kernels.files import check_fields, check_number, read_json, replace_json
from tokred_kernels.ops.window_match import check_pair
from tokred_kernels.patch import MARK, models
from tokred_kernels.patch.patched import Mark
from tokred_kernels.patch.state import State, Step
from tokred_kernels.token_map import TokenMap

OP = "calibrate_thresholds"
VERSION = 1  # of the JSON file
COUNT: tuple[type, float, float] = (int, 1, 2**63 - 1)
COSINE = 1 + 1e-6  # the largest, with rounding
RANGES = {"mean": (float, -COSINE, COSINE), "std": (float, 0, COSINE), "pairs": COUNT}
BLOCK_ROWS = 512  # of a Gram matrix at once
BLOCK_NUMBERS = 2**23  # float64 numbers at once: 64 MiB
LINE_SECONDS = 5.0  # between two lines where there is no progress bar


class Similarity(NamedTuple):
    """How alike the tokens of one layer are.

    Attributes:
        mean: of the cosines of all pairs.
        std: their standard deviation (of the pairs as they are: divided by their number, not by one less).
        pairs: how many pairs there were, each counted once.
    """

    mean: float
    std: float
    pairs: int


@dataclass(frozen=True, repr=False)
class Thresholds:
    """The result of `calibrate_thresholds`: how similar the tokens of each layer are; layers count from 1.

    Attributes:
        layers: a Similarity for each layer, in ascending order.
        window: the windows in which pairs were formed, (height, width); None for all pairs of an image.

    Raises:
        TypeError: `layers` is not a dict of Similarity.
        ValueError: `layers` is empty or does not ascend, or a number is NaN or out of range.
    """

    layers: dict[int, Similarity]
    window: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_values("tokred_kernels.Thresholds:", self.layers, self.window)

    def threshold(self, layer: int) -> float:
        """Mean + standard deviation of the layer's cosines; above 1, where nothing merges, if they spread that far.

        Raises:
            ValueError: the layer was not calibrated.
        """
        if not isinstance(layer, Integral) or layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise ValueError(f"tokred_kernels.Thresholds: layer must be one of {known}, got {shown(layer)}")
        return self.layers[layer].mean + self.layers[layer].std

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the thresholds as JSON, in one step; `load` returns exactly the same numbers.

        Raises:
            OSError: the file cannot be written; an old one is unchanged.
            ValueError: `layers` was changed to something that the class does not accept.
        """
        self.__post_init__()
        layers = {str(layer): similarity._asdict() for layer, similarity in self.layers.items()}
        replace_json(path, {"version": VERSION, "window": self.window, "layers": layers})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Thresholds:
        """Read a file that `save` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not JSON, has another version, a missing or unknown field, or a wrong value.
        """
        where = f"tokred_kernels.Thresholds.load: {os.fspath(path)}:"
        content = read_json(where, path)
        version = content.get("version") if isinstance(content, dict) else None
        if type(version) is not int or version != VERSION:
            raise ValueError(f"{where} version must be {VERSION}, got {reprlib.repr(version)}")
        check_fields(where, content, ("version", "window", "layers"))
        layers, window = content["layers"], content["window"]
        if not isinstance(layers, dict):
            raise ValueError(f"{where} layers must be an object, got {reprlib.repr(layers)}")
        for name, entry in layers.items():
            if not re.fullmatch("[1-9][0-9]{0,17}", name):
                raise ValueError(f"{where} layers must be named by numbers from 1, got {reprlib.repr(name)}")
            check_fields(f"{where} layer {name}", entry, Similarity._fields)
        read = {int(name): Similarity(**entry) for name, entry in layers.items()}
        window = tuple(window) if isinstance(window, list) else window
        _check_values(where, read, window)
        return cls(read, window)

    def __repr__(self) -> str:
        lines = [
            f"  {layer}: {self.threshold(layer):.4f} = {mean:.4f} + {std:.4f} over {pairs:,} pairs"
            for layer, (mean, std, pairs) in self.layers.items()
        ]
        where = "all pairs" if self.window is None else f"pairs in windows of {self.window[0]} x {self.window[1]}"
        return "\n".join([f"Thresholds(layer: mean + std of the cosines of {where}", *lines]) + ")"


def _check_values(where: str, layers: Any, window: Any) -> None:
    """Raise TypeError or ValueError unless these can be the fields of a Thresholds."""
    if not isinstance(layers, dict) or not all(isinstance(entry, Similarity) for entry in layers.values()):
        raise TypeError(f"{where} layers must be a dict of Similarity, got {shown(layers)}")
    if not layers:
        raise ValueError(f"{where} layers must have at least one layer, got none")
    for layer, similarity in layers.items():
        check_number(f"{where} a layer", layer, *COUNT)
        for name, value in similarity._asdict().items():
            check_number(f"{where} layer {layer}: {name}", value, *RANGES[name])
    for before, after in pairwise(layers):
        if after <= before:
            raise ValueError(f"{where} layers must ascend, got {after} after {before}")
    if window is not None:
        if not isinstance(window, tuple) or len(window) != 2:
            raise ValueError(f"{where} window must be two ints or null, got {shown(window)}")
        for length in window:
            check_number(f"{where} window", length, *COUNT)


def calibrate_thresholds(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[int] | None = None,
    window: tuple[int, int] | None = None,
    group: Any = None,
    progress: bool = True,
) -> Thresholds:
    """How alike tokens are where ALGM merges them, and from that its thresholds: mean + standard deviation.

    In each layer asked for, between attention and MLP, where ALGM merges, the cosine of every pair of different tokens
    of an image; class, distillation and register tokens are in no pair. A token of norm zero has cosine 0 with all
    others. The mean and the standard deviation are of all pairs of all images together.

    ALGM sets its threshold automatically, from the similarities that the plain model has on its training images. Its
    code has only the numbers that came of it, as settings (0.88 for ViT-S on ADE20K), and its authors' answer to who
    asks is to take the tokens of the first layer and look at their similarities. The rule here is mean + std, as in the
    authors' global step, which adds std / layer to the mean of the best similarities of each batch; here both are of
    all pairs of a data set. So calibrate the plain, trained model, on images prepared as for training, and give the
    result to `patch(model, "algm", threshold=...)`.

    Args:
        model: one of timm or transformers as `patch` takes it, not patched, with trained weights.
        batches: any iterable of images (B, 3, H, W), or of tuples or lists that start with images, as a DataLoader
            gives; sizes may differ between batches. Gone through once. Images are moved to the model's device.
        layers: which, counted from 1; default all.
        window: (height, width) in tokens: only pairs inside such windows of the grid, which is what the local step
            looks at. Neighbours are far more alike than tokens at large: mean + std can pass 1, and nothing merges.
        group: a torch.distributed process group whose processes each go through their own batches: all get the result
            over all of them. None for this process alone.
        progress: show a progress bar (lines, where tqdm is not installed) on stderr.

    Returns:
        Thresholds. No similarities are kept: sums in float64, one pass, O(N C + 512 min(N, C)) numbers at a time.

    The model runs in eval mode without gradients; afterwards every part is in the mode that it was in.

    Raises:
        TypeError: a wrong type, also of a batch.
        ValueError: a patched model, no images, no pairs, a layer that is not there, a window larger than the grid, or
            tokens that are NaN or infinite.
        NotImplementedError: a model that `patch` does not take.
        ImportError: the model's library is too old for patches.
    """
    anatomy = _check_model(model)
    if not isinstance(batches, Iterable):
        raise TypeError(f"tokred_kernels.{OP}: batches must be an iterable of images, got {shown(batches)}")
    check_flag(OP, "progress", progress)
    chosen = _check_layers(layers, len(anatomy.blocks))
    if window is not None:
        window = check_pair(OP, "window", window)
        if window[0] * window[1] < 2:
            raise ValueError(f"tokred_kernels.{OP}: window must hold at least 2 tokens, got {window}")
    device = next(model.parameters()).device
    sums = torch.zeros(len(chosen), 3, dtype=torch.float64, device=device)
    watching = {
        layer - 1: _Watch(sums=sums[row], num_prefix=anatomy.num_prefix, window=window)
        for row, layer in enumerate(chosen)
    }
    modes = [(module, module.training) for module in model.modules()]
    mark = Mark(OP, {"trace": False})
    show = progress and (group is None or torch.distributed.get_rank(group) == 0)
    models.install(model, mark, lambda index: watching.get(index, Step()))
    try:
        model.eval()
        with torch.no_grad():
            for number, batch in enumerate(_with_progress(batches) if show else batches):
                images = _images(batch, number).to(device)
                anatomy.model(images)
                # Over a group the others would wait for this process: there it is noticed at the end, by all.
                if group is None:
                    _check_finite(sums, chosen)
    finally:
        mark.remove(model)
        for module, mode in modes:
            module.training = mode
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    _check_finite(sums, chosen)
    return Thresholds(
        {layer: _finish(*row) for layer, row in zip(chosen, sums.tolist(), strict=True)},
        None if window is None else (int(window[0]), int(window[1])),
    )


def _check_model(model: Any) -> models.ModelSpec:
    """What `model`, one that `patch` takes and that is not patched, is made of."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"tokred_kernels.{OP}: model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, MARK):
        raise ValueError(
            f"tokred_kernels.{OP}: model must not be patched ({getattr(model, MARK)}): a threshold says how alike the "
            "tokens of the plain model are; call tokred_kernels.unpatch(model) first"
        )
    return models.examine(model)


def _check_layers(layers: Any, depth: int) -> list[int]:
    if layers is None:
        return list(range(1, depth + 1))
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        raise TypeError(f"tokred_kernels.{OP}: layers must be a sequence of ints, counted from 1, got {shown(layers)}")
    for layer in layers:
        check_count(OP, "layers", layer, least=1)
        if layer > depth:
            raise ValueError(f"tokred_kernels.{OP}: layers must be at most {depth}, the model's depth, got {layer}")
    return sorted(set(layers))


def _images(batch: Any, number: int) -> Tensor:
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        got = type(batch).__name__
        raise TypeError(
            f"tokred_kernels.{OP}: batches must give images (B, 3, H, W) or (images, ...), got {got} as batch {number}"
        )
    if images.dim() != 4:
        raise ValueError(
            f"tokred_kernels.{OP}: batches must give images (B, 3, H, W), got shape {shape(images)} as batch {number}"
        )
    return images


@dataclass(frozen=True, eq=False, kw_only=True)
class _Watch(Step):
    """Adds up what is seen between attention and MLP of one layer, and leaves the tokens as they are.

    Attributes:
        sums: the row [pairs, sum of cosines, sum of their squares] of the layer.
        num_prefix: so many leading tokens are in no pair.
        window: where pairs are formed; None for all.
    """

    sums: Tensor
    num_prefix: int
    window: tuple[int, int] | None

    def reduce(
        self, block: Any, x: Tensor, keys: Tensor, importance: Tensor | None, state: State
    ) -> tuple[Tensor, State, TokenMap | None]:
        """See `Step`."""
        tokens = x[:, self.num_prefix :]
        self.sums.add_(pair_sums(tokens if self.window is None else self._windows(tokens, state.grid)))
        return x, state, None

    def _windows(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """(B, N, C) to (B * windows, tokens of a window, C); the rim of a grid they do not divide is in no window."""
        batch, _, channels = tokens.shape
        if grid is None:
            raise NotImplementedError(
                f"tokred_kernels.{OP}: window needs the grid of patches, which the patch embedding does not know"
            )
        (down, across), (height, width) = grid, self.window or (1, 1)
        if height > down or width > across:
            raise ValueError(
                f"tokred_kernels.{OP}: window must fit into the grid {(down, across)}, got {(height, width)}"
            )
        rows, columns = down // height, across // width
        covered = tokens.reshape(batch, down, across, channels)[:, : rows * height, : columns * width]
        cut = covered.reshape(batch, rows, height, columns, width, channels).transpose(2, 3)
        return cut.reshape(batch * rows * columns, height * width, channels)


def pair_sums(x: Tensor) -> Tensor:
    """The number, the sum and the sum of squares of the cosines of all pairs of different tokens in a group.

    Args:
        x: (G, n, C), groups of n tokens; of any floating dtype, computed in float64.

    Returns:
        (3,) float64. Each pair counts once.

    With unit vectors u_i, sum over i != j of u_i . u_j is |sum u_i|^2 - sum |u_i|^2. Their squares sum to
    |U U^T|^2 - sum |u_i|^4 in the Frobenius norm, which U^T U has too: the smaller of n x n and C x C is computed, in
    blocks of rows.
    """
    groups, tokens, channels = x.shape
    small = min(tokens, channels)
    sums = x.new_zeros(3, dtype=torch.float64)
    sums[0] = groups * tokens * (tokens - 1) / 2
    if x.numel() == 0:
        return sums
    step = max(1, BLOCK_NUMBERS // (tokens * channels + min(BLOCK_ROWS, small) * small))
    for part in x.split(step):
        unit = part.double()
        norm = unit.norm(dim=-1, keepdim=True)
        unit = torch.where(norm == 0, 0, unit / norm)
        own = unit.square().sum(-1)
        sums[1] += (unit.sum(1).square().sum() - own.sum()) / 2
        side = unit if tokens <= channels else unit.transpose(1, 2)
        squares = torch.stack([(block @ side.transpose(1, 2)).square().sum() for block in side.split(BLOCK_ROWS, 1)])
        sums[2] += (squares.sum() - own.square().sum()) / 2
    return sums


def _check_finite(sums: Tensor, layers: list[int]) -> None:
    if not sums.isfinite().all():
        bad = [layer for layer, row in zip(layers, sums.isfinite().all(1).tolist(), strict=True) if not row]
        raise ValueError(
            f"tokred_kernels.{OP}: the tokens of every layer must be finite, got NaN or infinity in layer "
            f"{', '.join(map(str, bad))}; look at the images and the weights"
        )


def _finish(pairs: float, total: float, squares: float) -> Similarity:
    if pairs == 0:
        raise ValueError(
            f"tokred_kernels.{OP}: batches must give an image of two tokens or more, got no pair of tokens; an "
            "iterator that was gone through before gives nothing"
        )
    mean = total / pairs
    # Rounding can take the difference of a constant's moments below 0.
    return Similarity(mean, math.sqrt(max(squares / pairs - mean * mean, 0.0)), round(pairs))


def _with_progress(batches: Iterable[Any]) -> Iterator[Any]:
    """`batches`, with a bar on stderr, or a line now and then where tqdm is not installed."""
    try:
        from tqdm import tqdm  # noqa: PLC0415  (optional)
    except ImportError:
        yield from _with_lines(batches)
    else:
        yield from tqdm(batches, desc="calibrate", unit="batch", leave=False)


def _with_lines(batches: Iterable[Any]) -> Iterator[Any]:
    of = f" of {len(batches)}" if isinstance(batches, Sized) else ""
    said = time.monotonic()
    for number, batch in enumerate(batches, 1):
        yield batch
        if time.monotonic() - said >= LINE_SECONDS:
            said = time.monotonic()
            print(f"calibrate: batch {number}{of}", file=sys.stderr)
