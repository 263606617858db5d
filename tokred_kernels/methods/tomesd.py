# SPDX-License-Identifier: MIT
"""ToMe for Stable Diffusion: merge tokens before some parts of a transformer block, and unmerge them after."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokred_kernels.checks import check_count, check_generator
from tokred_kernels.methods.method import Method
from tokred_kernels.models.spec import check_not_replaced
from tokred_kernels.ops.grid_bipartite_match import draw_places, match_cells
from tokred_kernels.ops.window_match import check_pair
from tokred_kernels.token_map import TokenMap

DENOISERS = ("unet", "transformer")  # where a diffusers pipeline has the module that is patched
DOWNSAMPLES = (1, 2, 4, 8)
PARTS = {"merge_attn": "attn1", "merge_crossattn": "attn2", "merge_mlp": "ff"}
# Draws without a generator are hashes of 32 bits.
WORD = 0xFFFFFFFF
SCRAMBLER = 0x45D9F3B  # odd, and below 2^31, so that no product overflows
BLOCK_STEP = 0x9E3779B9  # 2^32 by the golden ratio, so that the cells of different blocks get different numbers


@dataclass(frozen=True)
class ToMeSD(Method):
    """ToMe for Stable Diffusion (Bolya & Hoffman, CVPR workshops 2023): transformer blocks run on fewer tokens.

    Each block matches its input once, before any norm (paper, section 4). The chosen parts then run on merged tokens
    (the mean of the tokens of a slot), and their output is copied back to each token.

    It patches a diffusers UNet2DConditionModel, DiTTransformer2DModel, PixArtTransformer2DModel or Transformer2DModel,
    or the `unet` or `transformer` of a pipeline. Patch a model before torch.compile wraps it, and before offloading or
    caching hooks are added to single blocks.

    Args:
        ratio: the share of tokens to remove, in [0, 1), default 0.5. Only sources are removed, so at most a share of
            1 - 1 / (sy sx) if the stride divides the grid.
        max_downsample: 1 (default), 2, 4 or 8: merge in blocks whose grid has at least 1 / max_downsample of the
            latent's height and width. If the model cuts the latent into patches, the grid of patches counts as the
            latent.
        stride: (height, width) of the cells with one destination each, default (2, 2). A block whose grid is smaller
            than one cell merges nothing.
        random: True (default) draws the destination of each cell for every block and timestep, the same for all images
            of a batch. For an odd batch, which has no pairs for classifier-free guidance, it is the top left token, as
            published. False always takes the top left token.
        merge_attn: merge for self attention (attn1). Default True.
        merge_crossattn: merge for cross attention (attn2), in blocks that have it. Default False.
        merge_mlp: merge for the MLP (ff). Default False.
        generator: for the draws. Default None: a hash of the first image's timestep and of the block's position
            decides, so a model has the same output for the same input, the seed of a pipeline determines its image, and
            torch's random state does not change. (The published code continues one generator from image to image.) A
            generator draws anew in every call. It breaks the graph of torch.compile at each draw, must be registered
            with a CUDA graph, and does not support a checkpoint around the whole model, which raises; the model's own
            enable_gradient_checkpointing works. A generator cannot be saved: save
            `dataclasses.replace(method, generator=None)`, and give the generator again on loading.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: a number is out of range, or no part merges.
    """

    name: ClassVar[str] = "tomesd"

    ratio: float = 0.5
    max_downsample: int = 1
    stride: tuple[int, int] = (2, 2)
    random: bool = True
    merge_attn: bool = True
    merge_crossattn: bool = False
    merge_mlp: bool = False
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        where = f"tokred_kernels.{self.owner}"
        self.check_flags("random", *PARTS)
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, Real):
            raise TypeError(f"{where}: ratio must be a number in [0, 1), got {self.ratio!r}")
        if not 0 <= float(self.ratio) < 1:
            raise ValueError(f"{where}: ratio must be in [0, 1), got {self.ratio}")
        max_downsample = check_count(self.owner, "max_downsample", self.max_downsample)
        if max_downsample not in DOWNSAMPLES:
            raise ValueError(f"{where}: max_downsample must be 1, 2, 4 or 8, got {max_downsample}")
        stride = check_pair(self.owner, "stride", self.stride)
        if stride == (1, 1):
            raise ValueError(f"{where}: stride must leave sources in each cell, got (1, 1)")
        if not self.parts:
            raise ValueError(f"{where}: one of {', '.join(PARTS)} must be True")
        check_generator(self.owner, self.generator)
        self.store(ratio=float(self.ratio), max_downsample=max_downsample, stride=stride)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts of a block that run on merged tokens."""
        return tuple(part for setting, part in PARTS.items() if getattr(self, setting))

    @classmethod
    def patched_module(cls, model: Any) -> Any:
        """Return `model` itself, or the unet or transformer of a pipeline."""
        modules = (model, *(getattr(model, name, None) for name in DENOISERS))
        module = next((module for module in modules if isinstance(module, nn.Module)), None)
        if module is None:
            raise TypeError(
                "tokred_kernels.patch: model must be a torch.nn.Module, or a diffusers pipeline with a unet or a "
                f"transformer, got {type(model).__name__}"
            )
        return module

    def apply(self, module: nn.Module, reusable: Collection[str] = ()) -> None:
        """See `Method`."""
        from tokred_kernels.models.diffusers import blocks, merging  # noqa: PLC0415  (imports diffusers)

        transformers = blocks.transformers_within(module, self.max_downsample)
        found = [block for transformer in transformers for block in blocks.blocks_of(transformer)]
        check_not_replaced(module, (blocks.BasicTransformerBlock,), "patch the model first, and add those afterwards")
        if all(getattr(block, name) is None for block in found for name in self.parts):
            raise ValueError(
                "tokred_kernels.patch: merge_attn or merge_mlp must be True for a model without cross attention, got "
                "merge_crossattn=True alone"
            )
        info = merging.MergingPatchInfo(self)
        merging.install(module, info, transformers, found, self._start_run, seed_of if self._hashes else None)

    @property
    def _hashes(self) -> bool:
        """True if a hash of the timestep draws the destinations."""
        return self.random and self.generator is None

    def _start_run(self, grid: tuple[int, int], seed: Tensor | None, timestep: Any, device: torch.device) -> Run:
        if seed is None and self._hashes:
            seed = seed_of(timestep, device)
        return Run(grid, self, seed)


class Run:
    """One run of the blocks of one transformer: see `models.diffusers.merging.MergeRun`.

    Maps are stored because a checkpoint calls a block twice with the same arguments: the second call must merge like
    the first one, and need not match again.
    """

    def __init__(self, grid: tuple[int, int], method: ToMeSD, seed: Tensor | None = None) -> None:
        self.grid = grid
        self.method = method
        self.parts = method.parts
        self.seed = seed
        self.maps: dict[nn.Module, TokenMap | None] = {}

    def map_of(self, block: Any, x: Tensor) -> TokenMap | None:
        """Return the map of the tokens (B, N, C) that enter `block`; None if all stay."""
        if torch.compiler.is_compiling():  # a compiled checkpoint must not change objects outside of it
            return self._match(block, x)
        if block not in self.maps:
            self.maps[block] = self._match(block, x)
        return self.maps[block]

    def _match(self, block: Any, x: Tensor) -> TokenMap | None:
        method = self.method
        down, across = method.stride
        r = int(x.shape[1] * method.ratio)
        if r == 0 or down > self.grid[0] or across > self.grid[1]:
            return None
        geometry = (*self.grid, down, across, 0)
        drawn = None
        # In an even batch, images with and without their prompt are pairs, which need the same draw.
        if method.random and x.shape[0] % 2 == 0:
            if method.generator is not None:
                drawn = _draw(geometry, x.device, method.generator)
            elif self.seed is not None:
                drawn = hashed_places(self.seed, block.tokred_number, geometry)
        return match_cells(x, r, geometry, drawn)


def _draw(geometry: tuple[int, int, int, int, int], device: torch.device, generator: torch.Generator) -> Tensor:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "tokred_kernels: a checkpoint around the whole model would draw other tokens from the generator when it "
            "computes the model again, and the gradients would be wrong; patch the model without generator=, or call "
            "its enable_gradient_checkpointing() instead"
        )
    return draw_places(geometry, device, generator)


def seed_of(timestep: Any, device: torch.device) -> Tensor:
    """Return a seed from 0 to 2^32 - 1 for a timestep, or for the first of several; int64, on the device."""
    first = torch.as_tensor(0 if timestep is None else timestep, device=device).reshape(-1)[:1].sum()
    return _scramble(first.float().view(torch.int32).long() & WORD)


def hashed_places(seed: Tensor, block: int, geometry: tuple[int, int, int, int, int]) -> Tensor:
    """Return the place of each cell's destination in its cell, (cells,) int64, from a seed and a block's number."""
    height, width, down, across, _ = geometry
    first, cells = block * BLOCK_STEP & WORD, (height // down) * (width // across)
    return _scramble(torch.arange(first, first + cells, device=seed.device) & WORD ^ seed) % (down * across)


def _scramble(x: Tensor) -> Tensor:
    """Map numbers from 0 to 2^32 - 1 one to one to numbers of this range that look random."""
    for _ in range(2):
        x = (x >> 16 ^ x) * SCRAMBLER & WORD
    return x >> 16 ^ x
