# SPDX-License-Identifier: MIT
"""ALGM: merge similar windows in an early block, and similar tokens from anywhere in later ones."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokred_kernels.checks import check_choice, check_count
from tokred_kernels.methods.algm.thresholds import Thresholds
from tokred_kernels.methods.method import Method, ascending_layers, check_layers_exist
from tokred_kernels.models.base import inspect_model, install
from tokred_kernels.models.patched import PatchInfo
from tokred_kernels.models.reducer import BlockReducer
from tokred_kernels.models.spec import BlockSpec
from tokred_kernels.models.state import TokenState
from tokred_kernels.ops.adaptive_bipartite_match import adaptive_bipartite_match
from tokred_kernels.ops.counts import BATCH, IMAGE, check_count_mode, check_threshold
from tokred_kernels.ops.window_match import KEEP, REFUSE, check_pair, window_match
from tokred_kernels.partition import every_other
from tokred_kernels.token_map import TokenMap
from tokred_kernels.windows import Windows

_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # always False before torch 2.7


@dataclass(frozen=True)
class ALGM(Method):
    """ALGM (Norouzi et al., CVPR 2024): merge windows in an early block, then pairs of tokens in later blocks.

    Merging runs between attention and MLP and compares the tokens x themselves. If a global layer merges no pair, the
    tokens keep their order. The published code reorders them even then, tokens with an even index first, so that its
    next global layer compares other pairs than this one. Patch dropout destroys the grid, so a model that trains with
    it raises in its forward.

    Args:
        layers: indices of blocks, ascending and counted from 0 (the paper counts from 1). In the first one, windows of
            the grid merge (`window_match`, paper, section 3.2); in the others, pairs from anywhere
            (`adaptive_bipartite_match`, section 3.3). Default (0, 4), as published for 12 blocks.
        window: (height, width) of a window, in patches, default (2, 2). An image smaller than one window merges none.
        threshold: a window merges if its mean cosine is at least this number. Default 0.88, as in the published code
            for ViT-S on ADE20K. The result of `calibrate_thresholds` stands for its threshold of the first layer.
        global_threshold: a pair merges if its cosine is at least this number; one number, or one for each later layer.
            The result of `calibrate_thresholds` stands for its thresholds of these layers. Default None: mean + std /
            layer of the best similarities, as published, where the layer is counted from 1.
        count: how many windows and pairs merge. "batch" (default, as published): in every image as many as in the image
            with the fewest. "image": every image has its own count; from then on, tokens are packed (T, C), and so is
            the output of `forward_features`, and an image's result does not depend on the batch. An int for all layers,
            or a list with one per layer: a fixed number, whatever the similarities. Only fixed counts never wait for
            the device, and work with torch.compile(fullgraph=True) and CUDA graphs.
        uneven: if the window does not divide the grid, "keep" (default) leaves the rest unmerged, and "refuse" raises.
        prop_attn: True weighs each key by its token's size. Default False, like the published code, whose attention
            takes sizes and never uses them.
        group: with count="batch", a torch.distributed process group whose processes all merge the same number. A group
            cannot be saved: save `dataclasses.replace(method, group=None)`, and give the group again on loading.
        trace: True (default) keeps the maps of the last forward, for `model.token_map`.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: a number is out of range, `layers` does not ascend, or a layer was not calibrated.
    """

    name: ClassVar[str] = "algm"

    layers: tuple[int, ...] = (0, 4)
    window: tuple[int, int] = (2, 2)
    threshold: float | Thresholds = 0.88
    global_threshold: float | tuple[float, ...] | Thresholds | None = None
    count: str | int | tuple[int, ...] = BATCH
    uneven: str = KEEP
    prop_attn: bool = False
    group: Any = None
    trace: bool = True

    def __post_init__(self) -> None:
        self.check_flags("prop_attn", "trace")
        layers = ascending_layers(self.owner, self.layers)
        window = check_pair(self.owner, "window", self.window)
        if window == (1, 1):
            raise ValueError(f"tokred_kernels.{self.owner}: window must hold at least 2 tokens, got {window}")
        check_choice(self.owner, "uneven", self.uneven, (KEEP, REFUSE))
        count: Any = self.count
        if isinstance(count, (tuple, list)):
            if len(count) != len(layers):
                raise ValueError(
                    f"tokred_kernels.{self.owner}: count must have an int for each of {len(layers)} layers, got "
                    f"{len(count)}"
                )
            count = tuple(check_count(self.owner, f"count[{index}]", number) for index, number in enumerate(count))
            for number in count:
                check_count_mode(self.owner, number, self.group)
        else:
            count = check_count_mode(self.owner, count, self.group)
        threshold, later = self.threshold, self.global_threshold
        if isinstance(threshold, Thresholds):
            threshold = threshold.threshold(layers[0])
        threshold = check_threshold(f"{self.owner}(threshold=)", threshold)
        if isinstance(later, Thresholds):
            later = tuple(later.threshold(layer) for layer in layers[1:])
        elif isinstance(later, (tuple, list)):
            if len(later) != len(layers) - 1:
                raise ValueError(
                    f"tokred_kernels.{self.owner}: global_threshold must have a number for each of the "
                    f"{len(layers) - 1} layers after the first, got {len(later)}"
                )
            later = tuple(check_threshold(f"{self.owner}(global_threshold=)", one) for one in later)
        elif later is not None:
            later = check_threshold(f"{self.owner}(global_threshold=)", later)
        self.store(layers=layers, window=window, threshold=threshold, global_threshold=later, count=count)

    def apply(self, module: nn.Module, reusable: Collection[str] = ()) -> None:
        """See `Method`."""
        spec = inspect_model(module)
        check_layers_exist(self, len(spec.blocks))
        if self.count == IMAGE and not spec.supports_packing:
            raise NotImplementedError(
                f'tokred_kernels.patch: count="image" packs tokens, (T, C), which a {type(module).__name__} does not '
                'support; give "batch" or an int'
            )
        if spec.gridless_embed is not None:
            raise NotImplementedError(
                f"tokred_kernels.patch: windows need the grid of patches, and {spec.gridless_embed}, the model's "
                "patch_embed, does not define one; timm's PatchEmbed and HybridEmbed do"
            )
        if spec.grid is not None:
            height, width = self.window
            if height > spec.grid[0] or width > spec.grid[1]:
                raise ValueError(f"tokred_kernels.patch: window must fit into the grid {spec.grid}, got {self.window}")
            if self.uneven == REFUSE and (spec.grid[0] % height or spec.grid[1] % width):
                raise ValueError(f"tokred_kernels.patch: window must divide the grid {spec.grid}, got {self.window}")
        first, *later = self.layers
        counts, thresholds = _per_layer(self.count, len(self.layers)), _per_layer(self.global_threshold, len(later))
        common: Any = {"prop_attn": self.prop_attn, "group": self.group, "num_prefix": spec.num_prefix}
        reducers: dict[int, BlockReducer] = {
            first: WindowReducer(
                threshold=self.threshold,  # type: ignore[arg-type]
                window=self.window,
                count=counts[0],
                uneven=self.uneven,
                **common,
            )
        }
        for layer, count, threshold in zip(later, counts[1:], thresholds, strict=True):
            reducers[layer] = GlobalReducer(layer=layer, threshold=threshold, count=count, **common)
        install(module, PatchInfo(self), lambda index: reducers.get(index, BlockReducer(self.prop_attn)))


def _per_layer(value: Any, num_layers: int) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,) * num_layers


@dataclass(frozen=True)
class AdaptiveReducer(BlockReducer):
    """What both reducers of ALGM have in common: a count that can depend on the images."""

    count: int | str = BATCH
    group: Any = None
    num_prefix: int = 0

    def __deepcopy__(self, memo: Any) -> AdaptiveReducer:
        """Return the same object: it is immutable, and a process group cannot be copied."""
        return self

    def match(self, x: Tensor, keys: Tensor, state: TokenState) -> TokenMap | None:
        """See `BlockReducer`."""
        if isinstance(self.count, str) and (torch.jit.is_tracing() or _is_exporting()):
            raise NotImplementedError(
                f'tokred_kernels: with count="{self.count}" the images decide how many tokens merge, but tracing and '
                "exporting would fix the number of the example; patch the model with count=<int>"
            )
        token_map = self.adaptive_match(x, state)
        if token_map is None or (token_map.packed is None and token_map.num_out == token_map.num_tokens):
            return None  # every token stays at its place
        return token_map

    def adaptive_match(self, x: Tensor, state: TokenState) -> TokenMap | None:
        """Return the map of the tokens x; it can be an identity."""
        raise NotImplementedError


@dataclass(frozen=True)
class WindowReducer(AdaptiveReducer):
    """Merge windows of similar tokens (paper, section 3.2)."""

    threshold: float = 1.0
    window: tuple[int, int] = (1, 2)
    uneven: str = KEEP

    def adaptive_match(self, x: Tensor, state: TokenState) -> TokenMap | None:
        """See `AdaptiveReducer`."""
        if state.grid is None:
            raise NotImplementedError(
                "tokred_kernels: windows need the whole grid of patches, and patch dropout leaves "
                f"{x.shape[1] - self.num_prefix} patches that form none; set model.patch_drop = torch.nn.Identity(), "
                "or call model.eval()"
            )
        if self.uneven == KEEP and (self.window[0] > state.grid[0] or self.window[1] > state.grid[1]):
            return None
        settings: Any = {"window": self.window, "grid": state.grid, "num_prefix": self.num_prefix}
        return window_match(x, self.threshold, count=self.count, uneven=self.uneven, group=self.group, **settings)

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int | None:
        """See `BlockReducer`."""
        if isinstance(self.count, str):
            return None
        windows = Windows(self.num_prefix, *grid, *self.window)
        return tokens - min(self.count, windows.number()) * (windows.size() - 1)


@dataclass(frozen=True)
class GlobalReducer(AdaptiveReducer):
    """Merge pairs of similar tokens from anywhere (paper, section 3.3); `layer` counts from 0."""

    layer: int = 0
    threshold: float | None = None

    def adaptive_match(self, x: Tensor, state: TokenState) -> TokenMap | None:
        """See `AdaptiveReducer`."""
        return adaptive_bipartite_match(
            x,
            layer_index=self.layer + 1 if self.threshold is None else None,
            threshold=self.threshold,
            count=self.count,
            num_prefix=self.num_prefix,
            packed=state.packing,
            group=self.group,
        )

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int | None:
        """See `BlockReducer`."""
        if isinstance(self.count, str):
            return None
        partition = every_other(tokens, self.count, self.num_prefix, False, False)
        return tokens if partition is None else partition.num_out()

    def selection_flops(self, entering: int, attended: int, spec: BlockSpec) -> int:
        """See `BlockReducer`: the matrix product of sources and destinations in the embedding dimension."""
        most = attended if isinstance(self.count, str) else self.count
        partition = every_other(attended, most, self.num_prefix, False, False)
        if partition is None:
            return 0
        return 2 * partition.num_src * partition.num_dst * spec.embed_dim
