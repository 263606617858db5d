# SPDX-License-Identifier: MIT
"""ALGM in ViTs: windows merge in an early block, similar tokens anywhere in later ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokred_kernels.backends import use_backend
from tokred_kernels.methods.algm.calibration import Thresholds
from tokred_kernels.methods.schedule import count_per_layer, merging_layers
from tokred_kernels.models import base as models
from tokred_kernels.models.base import ModelSpec, Parts
from tokred_kernels.models.patched import Mark
from tokred_kernels.models.state import State, Step
from tokred_kernels.ops.adaptive_bipartite_match import adaptive_bipartite_match
from tokred_kernels.ops.counts import BATCH, IMAGE, check_threshold
from tokred_kernels.ops.window_match import KEEP, check_pair, window_match
from tokred_kernels.partition import every_other
from tokred_kernels.token_map import TokenMap
from tokred_kernels.windows import Windows

LAYERS = (1, 5)  # as published, for 12 blocks
_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # always False before torch 2.7


@dataclass(frozen=True)
class MergeWindows(Step):
    """What the first given layer does: merge windows whose tokens are alike (ALGM, section 3.2)."""

    threshold: float = 1.0
    window: tuple[int, int] = (1, 2)
    number: int | str = BATCH
    uneven: str = KEEP
    group: Any = None
    num_prefix: int = 0

    def __deepcopy__(self, memo: Any) -> MergeWindows:
        """The same: it never changes, and a process group has no copy."""
        return self

    def match(self, x: Tensor, keys: Tensor, state: State) -> TokenMap | None:
        """See `Step`."""
        if state.grid is None:
            raise NotImplementedError(
                "tokred_kernels: windows need every patch in its place, and patch dropout leaves "
                f"{x.shape[1] - self.num_prefix} that are no grid; set model.patch_drop = torch.nn.Identity(), or call "
                "model.eval()"
            )
        if self.uneven == KEEP and (self.window[0] > state.grid[0] or self.window[1] > state.grid[1]):
            return None
        _refuse_fixing(self.number)
        settings: Any = {"window": self.window, "grid": state.grid, "num_prefix": self.num_prefix}
        settings |= {"uneven": self.uneven, "group": self.group}
        return _unless_identity(window_match(x, self.threshold, count=self.number, **settings))

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int | None:
        """See `Step`."""
        if isinstance(self.number, str):
            return None
        windows = Windows(self.num_prefix, *grid, *self.window)
        return tokens - min(self.number, windows.number()) * (windows.size() - 1)


@dataclass(frozen=True)
class MergeAlike(Step):
    """What the other given layers do: merge pairs of tokens that are alike (ALGM, section 3.3)."""

    layer: int = 1
    threshold: float | None = None
    number: int | str = BATCH
    group: Any = None
    num_prefix: int = 0

    def __deepcopy__(self, memo: Any) -> MergeAlike:
        """The same: it never changes, and a process group has no copy."""
        return self

    def match(self, x: Tensor, keys: Tensor, state: State) -> TokenMap | None:
        """See `Step`."""
        _refuse_fixing(self.number)
        layer = self.layer if self.threshold is None else None
        settings: Any = {"num_prefix": self.num_prefix, "packed": state.packing, "group": self.group}
        token_map = adaptive_bipartite_match(
            x, layer_index=layer, threshold=self.threshold, count=self.number, **settings
        )
        return _unless_identity(token_map)

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int | None:
        """See `Step`."""
        if isinstance(self.number, str):
            return None
        partition = every_other(tokens, self.number, self.num_prefix, False, False)
        return tokens if partition is None else partition.num_out()

    def choice_flops(self, entering: int, attended: int, parts: Parts) -> int:
        """See `Step`: the product of sources and destinations, of all channels."""
        most = attended if isinstance(self.number, str) else self.number
        partition = every_other(attended, most, self.num_prefix, False, False)
        if partition is None:
            return 0
        return 2 * partition.num_src * partition.num_dst * parts.width


def _refuse_fixing(count: int | str) -> None:
    """Raise NotImplementedError if a count that depends on the images would become a constant of a graph."""
    if isinstance(count, str) and (torch.jit.is_tracing() or _is_exporting()):
        raise NotImplementedError(
            f'tokred_kernels: with count="{count}" the images decide how many tokens merge, which a traced or exported '
            "model would fix at the number of its example; patch the model with count=<int>"
        )


def _unless_identity(token_map: TokenMap) -> TokenMap | None:
    """The map, or None where it leaves every token in its place."""
    stays = token_map.packed is None and token_map.num_out == token_map.num_tokens
    return None if stays else token_map


def apply(
    model: Any,
    *,
    layers: Any = LAYERS,
    window: tuple[int, int] = (2, 2),
    threshold: float | Thresholds = 0.88,
    global_threshold: float | Thresholds | None = None,
    count: Any = BATCH,
    uneven: str = KEEP,
    prop_attn: bool = False,
    group: Any = None,
    trace: bool = True,
) -> None:
    """Merge windows, then pairs of tokens, that are alike: ALGM (CVPR 2024), between attention and MLP.

    Args:
        model: the ViT.
        layers: numbers of blocks, counted from 1, ascending. In the first, windows of the grid merge (`window_match`);
            in every other one pairs from anywhere (`adaptive_bipartite_match`). Both look at the tokens x themselves.
        window: height and width of a window, in patches. In an image smaller than one window no window merges.
        threshold: the mean cosine from which on a window merges, or what `calibrate_thresholds` gave: then that of the
            first layer. 0.88 (default) is what the published code has for ViT-S on ADE20K.
        global_threshold: None (default): mean + std / layer of the best similarities at hand, as published. Or the
            cosine from which on a pair merges; or what `calibrate_thresholds` gave, for each layer its own.
        count: how many windows, and how many pairs, merge. "batch" (default, as published): in every image as many as
            in the one that has the fewest. "image": in every image its own number; from then on tokens are packed
            (T, C), as is what `forward_features` returns, and an image gives what it gives alone. An int, for every
            given layer, or a list with one for each: so many, whatever the similarities; nothing is read back to the
            host, and torch.compile(fullgraph=True) and CUDA graphs work.
        uneven: if the window does not divide the grid, "keep" (default) leaves the rest unmerged and "refuse" raises.
        prop_attn: True lets keys count as often as the tokens they stand for. False (default) is what the published
            code does: its attention takes sizes and never uses them.
        group: with count="batch", a torch.distributed process group whose processes all merge as many.
        trace: True (default) keeps the maps of the last forward, for `model.token_map`.

    If a global layer merges no pair, the tokens keep their order. The published code reorders them even then, the
    tokens with even index first, so that its next global layer compares other pairs than this one.

    Patch dropout has no grid, so a model that trains with it raises in its forward.

    Raises as `patch` says.
    """
    models.check_switches(prop_attn=prop_attn, trace=trace)
    anatomy = models.examine(model)
    given = merging_layers(layers, len(anatomy.blocks), LAYERS)
    numbers = count_per_layer(count, len(given), group)
    if IMAGE in numbers and not anatomy.packs:
        raise NotImplementedError(
            f'tokred_kernels.patch: count="image" packs tokens, (T, C), which the forward of a {type(model).__name__} '
            'does not take; give "batch" or an int'
        )
    prefix = anatomy.num_prefix
    local = _at("threshold", threshold, given[0])
    window = _check_window(anatomy, local, window, uneven)
    steps: dict[int, Step] = {given[0]: MergeWindows(prop_attn, local, window, numbers[0], uneven, group, prefix)}
    for layer, number in zip(given[1:], numbers[1:], strict=True):
        own = None if global_threshold is None else _at("global_threshold", global_threshold, layer)
        steps[layer] = MergeAlike(prop_attn, layer, own, number, group, prefix)
    settings: dict[str, Any] = {"layers": given, "window": window, "threshold": threshold}
    settings |= {
        "global_threshold": global_threshold,
        "count": count,
        "uneven": uneven,
        "prop_attn": prop_attn,
        "group": group,
        "trace": trace,
    }
    rest = Step(prop_attn)
    models.install(model, Mark("algm", settings), lambda index: steps.get(index + 1, rest))


def _at(name: str, threshold: Any, layer: int) -> float:
    """The number that `threshold` is, or that it has for `layer`."""
    if isinstance(threshold, Thresholds):
        return threshold.threshold(layer)
    check_threshold(f"patch({name}=)", threshold)
    return threshold


def _check_window(anatomy: ModelSpec, threshold: float, window: Any, uneven: Any) -> tuple[int, int]:
    """`window` as a pair; raise unless `window_match` takes these settings on the model's grid."""
    if anatomy.gridless is not None:
        raise NotImplementedError(
            f"tokred_kernels.patch: windows need the grid of patches, and {anatomy.gridless}, the "
            "model's patch_embed, does not tell one; timm's PatchEmbed and HybridEmbed do"
        )
    window = check_pair("patch", "window", window)
    # Where images may be of any size, all that can be said now is that the window is one.
    grid = window if anatomy.grid is None else anatomy.grid
    none = torch.empty(0, grid[0] * grid[1], 1)
    with use_backend("reference"):  # the op's own checks, on no image at all
        window_match(none, threshold, window=window, grid=grid, num_prefix=0, uneven=uneven)
    return window
