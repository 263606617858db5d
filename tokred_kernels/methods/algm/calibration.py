# SPDX-License-Identifier: MIT
"""Calibrate ALGM's thresholds on data."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokred_kernels.checks import check_count, check_flag, shape, shown
from tokred_kernels.methods.algm.thresholds import Similarity, Thresholds
from tokred_kernels.methods.method import Method
from tokred_kernels.models.base import inspect_model, install
from tokred_kernels.models.patched import PatchInfo
from tokred_kernels.models.reducer import BlockReducer
from tokred_kernels.models.spec import PATCH_INFO, ModelSpec
from tokred_kernels.models.state import TokenState
from tokred_kernels.ops.window_match import check_pair
from tokred_kernels.token_map import TokenMap

OP = "calibrate_thresholds"
BLOCK_ROWS = 512  # of a Gram matrix at once
BLOCK_NUMBERS = 2**23  # float64 numbers at once: 64 MiB
LINE_SECONDS = 5.0  # between two lines of progress, if tqdm is not installed


def calibrate_thresholds(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[int] | None = None,
    window: tuple[int, int] | None = None,
    group: Any = None,
    progress: bool = True,
) -> Thresholds:
    """Measure how similar tokens are where ALGM merges them, and derive its thresholds: mean + standard deviation.

    For each layer, the cosine of every pair of different tokens of an image is taken between attention and MLP. Class,
    distillation and register tokens are in no pair, and a token of norm zero has cosine 0 with all others. Mean and
    standard deviation are over all pairs of all images.

    ALGM derives its threshold from the similarities in the unpatched model on its training images. The published code
    has only the resulting numbers (0.88 for ViT-S on ADE20K), and the authors advise users to look at the similarities
    in the first layer. The rule here is mean + std. The authors' global step is similar: it adds std / layer to the
    mean of the best similarities of each batch. Calibrate the unpatched, trained model on images that are preprocessed
    as for training, and pass the result to `methods.ALGM(threshold=...)`.

    Args:
        model: a trained timm or transformers model that `patch` supports, not patched.
        batches: any iterable over images (B, 3, H, W), or over tuples or lists that start with images, such as a
            DataLoader; sizes can differ between batches. It is read once. Images are moved to the model's device.
        layers: indices of blocks, counted from 0; default all.
        window: (height, width) in tokens: only pairs inside such windows of the grid, like the local step of ALGM.
            Neighbors are far more similar than other tokens: mean + std can exceed 1, and then nothing merges.
        group: a torch.distributed process group. Each process reads its own batches, and all get the result over all
            batches. None for this process alone.
        progress: show a progress bar on stderr, or lines if tqdm is not installed.

    Returns:
        Thresholds. No similarities are stored: one pass sums in float64, with O(N C + 512 min(N, C)) numbers in memory.

    The model runs in eval mode without gradients. Afterwards, every module has its previous mode.

    Raises:
        TypeError: a wrong type, also of a batch.
        ValueError: a patched model, no images, no pairs, a missing layer, a window larger than the grid, or tokens that
            are NaN or infinite.
        NotImplementedError: a model that `patch` does not support.
        ImportError: the model's library is too old.
    """
    spec = _check_model(model)
    if not isinstance(batches, Iterable):
        raise TypeError(f"tokred_kernels.{OP}: batches must be an iterable of images, got {shown(batches)}")
    check_flag(OP, "progress", progress)
    chosen = _check_layers(layers, len(spec.blocks))
    if window is not None:
        window = check_pair(OP, "window", window)
        if window[0] * window[1] < 2:
            raise ValueError(f"tokred_kernels.{OP}: window must hold at least 2 tokens, got {window}")
    device = next(model.parameters()).device
    sums = torch.zeros(len(chosen), 3, dtype=torch.float64, device=device)
    observers = {
        layer: _PairObserver(sums=sums[row], num_prefix=spec.num_prefix, window=window)
        for row, layer in enumerate(chosen)
    }
    modes = [(module, module.training) for module in model.modules()]
    info = PatchInfo(_Calibration())
    show = progress and (group is None or torch.distributed.get_rank(group) == 0)
    install(model, info, lambda index: observers.get(index, BlockReducer()))
    try:
        model.eval()
        with torch.no_grad():
            for number, batch in enumerate(_with_progress(batches) if show else batches):
                images = _images(batch, number).to(device)
                spec.model(images)
                # In a group, the other processes would wait for this one: there, all check at the end.
                if group is None:
                    _check_finite(sums, chosen)
    finally:
        info.remove(model)
        for module, mode in modes:
            module.training = mode
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    _check_finite(sums, chosen)
    return Thresholds(
        {layer: _finish(*row) for layer, row in zip(chosen, sums.tolist(), strict=True)},
        None if window is None else (int(window[0]), int(window[1])),
    )


@dataclass(frozen=True)
class _Calibration(Method):
    """What a model is patched with during calibration."""

    name: ClassVar[str] = OP

    trace: bool = False


def _check_model(model: Any) -> ModelSpec:
    if hasattr(model, PATCH_INFO):
        raise ValueError(
            f"tokred_kernels.{OP}: model must not be patched ({getattr(model, PATCH_INFO)}): thresholds describe the "
            "tokens of the unpatched model; call tokred_kernels.unpatch(model) first"
        )
    return inspect_model(model)


def _check_layers(layers: Any, depth: int) -> list[int]:
    if layers is None:
        return list(range(depth))
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        raise TypeError(f"tokred_kernels.{OP}: layers must be a sequence of ints, counted from 0, got {shown(layers)}")
    for layer in layers:
        check_count(OP, "layers", layer)
        if layer >= depth:
            raise ValueError(f"tokred_kernels.{OP}: layers must be at most {depth - 1}, the last block, got {layer}")
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
class _PairObserver(BlockReducer):
    """Sum the similarities between attention and MLP of one layer, and remove nothing.

    Attributes:
        sums: the layer's row [pairs, sum of cosines, sum of squared cosines].
        num_prefix: this many leading tokens are in no pair.
        window: the windows in which pairs are formed; None for all pairs.
    """

    sums: Tensor
    num_prefix: int
    window: tuple[int, int] | None

    def reduce(
        self, block: Any, x: Tensor, keys: Tensor, importance: Tensor | None, state: TokenState
    ) -> tuple[Tensor, TokenState, TokenMap | None]:
        """See `BlockReducer`."""
        tokens = x[:, self.num_prefix :]
        self.sums.add_(pair_sums(tokens if self.window is None else self._windows(tokens, state.grid)))
        return x, state, None

    def _windows(self, tokens: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """Cut (B, N, C) into (B * windows, tokens of a window, C), without the rest at the right and bottom."""
        batch, _, channels = tokens.shape
        if grid is None:
            raise NotImplementedError(
                f"tokred_kernels.{OP}: window needs a grid of patches, which the patch embedding does not define"
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
    """Return number, sum and sum of squares of the cosines of all pairs of different tokens in each group.

    Args:
        x: (G, n, C), groups of n tokens, of any floating dtype; the sums are computed in float64.

    Returns:
        (3,) float64. Each pair counts once.

    With unit vectors u_i, the sum over i != j of u_i . u_j is |sum u_i|^2 - sum |u_i|^2. The squares sum to
    |U U^T|^2 - sum |u_i|^4 in the Frobenius norm, and |U U^T| = |U^T U|: the smaller of n x n and C x C is computed, in
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
            "exhausted iterator gives no batches"
        )
    mean = total / pairs
    # Rounding can make the variance of a constant negative.
    return Similarity(mean, math.sqrt(max(squares / pairs - mean * mean, 0.0)), round(pairs))


def _with_progress(batches: Iterable[Any]) -> Iterator[Any]:
    """Iterate over `batches` with a progress bar on stderr, or with lines if tqdm is not installed."""
    try:
        from tqdm import tqdm  # noqa: PLC0415  (optional)
    except ImportError:
        yield from _with_lines(batches)
    else:
        yield from tqdm(batches, desc="calibrate", unit="batch", leave=False)


def _with_lines(batches: Iterable[Any]) -> Iterator[Any]:
    of = f" of {len(batches)}" if isinstance(batches, Sized) else ""
    printed = time.monotonic()
    for number, batch in enumerate(batches, 1):
        yield batch
        if time.monotonic() - printed >= LINE_SECONDS:
            printed = time.monotonic()
            print(f"calibrate: batch {number}{of}", file=sys.stderr)
