# SPDX-License-Identifier: MIT
"""ToMe for Stable Diffusion in diffusers' transformer blocks: merge before, unmerge after (Bolya & Hoffman 2023).

A patched block runs diffusers' own forward, on a stand-in for itself whose attentions and MLP merge what comes in and
unmerge what goes out. What one run of the blocks shares (the grid, the maps) travels with its arguments, and modules
keep none of it: safe to checkpoint, to compile and to call from several threads.
"""

from __future__ import annotations

import inspect
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred_kernels.models.diffusers.blocks import (
    BasicTransformerBlock,
    blocks_of,
    downsampled,
    resolve,
    transformers_within,
)
from tokred_kernels.models.replaced import refuse_replaced
from tokred_kernels.ops.grid_bipartite_match import draw_places, match_cells
from tokred_kernels.ops.merge import merge
from tokred_kernels.ops.unmerge import unmerge
from tokred_kernels.ops.window_match import check_pair
from tokred_kernels.patching import MARK
from tokred_kernels.token_map import TokenMap

DOWNSAMPLES = (1, 2, 4, 8)
# By a name of its own: torch.compile does not look into a class that diffusers marks as allowed in graphs.
PLAIN_FORWARD: Any = BasicTransformerBlock.forward
# The argument of a transformer's forward that reaches its blocks as it is, also through a checkpoint.
CARRIER = "cross_attention_kwargs"
# What we put into it.
RUN, KEY = "tokred_run", "tokred_key"
# Draws without a generator are hashes of 32 bits.
WORD = 0xFFFFFFFF
SCRAMBLER = 0x45D9F3B  # odd, and below 2^31, so that no product overflows
BLOCK_STEP = 0x9E3779B9  # 2^32 by the golden ratio: cells of different blocks get different numbers
# An argument of attention that has a place for every token.
PLACED = "ip_adapter_masks"


class Mark(NamedTuple):
    """What was put into a model. A model that carries one is patched."""

    settings: dict[str, Any]

    def __str__(self) -> str:
        return ", ".join(['"tomesd"', *(f"{name}={value!r}" for name, value in self.settings.items())])

    def remove(self, model: nn.Module) -> None:
        """Give every block its own class back, and take out the hooks."""
        refuse_replaced(model, (MergingBlock,), "take those out again before you call tokred_kernels.unpatch")
        for module in model.modules():
            if type(module) is MergingBlock:
                module.__class__ = BasicTransformerBlock  # type: ignore[assignment]
                module.__dict__.pop("tokred_number", None)
            hooks = [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Hook)]
            for key in hooks:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        delattr(model, MARK)


class Settings(NamedTuple):
    """What all blocks share: of `patch`, and `parts`, the names of the submodules that see merged tokens."""

    ratio: float
    stride: tuple[int, int]
    random: bool
    parts: tuple[str, ...]
    generator: torch.Generator | None = None


class Run:
    """One run of the blocks of one transformer: the grid of their tokens, and the map of each block once it has one.

    The maps are kept because a checkpoint calls a block twice with the same arguments: the second time must merge as
    the first did, and need not match again.
    """

    def __init__(self, grid: tuple[int, int], settings: Settings, key: Tensor | None = None) -> None:
        self.grid = grid
        self.settings = settings
        self.key = key
        self.maps: dict[nn.Module, TokenMap | None] = {}

    def map_of(self, block: Any, x: Tensor) -> TokenMap | None:
        """Where the tokens (B, N, C) that enter `block` go; None where all stay."""
        if torch.compiler.is_compiling():  # it may not write to what outlives a checkpoint
            return self._match(block, x)
        if block not in self.maps:
            self.maps[block] = self._match(block, x)
        return self.maps[block]

    def _match(self, block: Any, x: Tensor) -> TokenMap | None:
        ratio, (down, across), random, _, generator = self.settings
        r = int(x.shape[1] * ratio)
        if r == 0 or down > self.grid[0] or across > self.grid[1]:
            return None
        geometry = (*self.grid, down, across, 0)
        drawn = None
        # An odd batch holds no pairs of an image with and without its prompt, which a draw would not treat alike.
        if random and x.shape[0] % 2 == 0:
            if generator is not None:
                drawn = _draw(geometry, x.device, generator)
            elif self.key is not None:
                drawn = places(self.key, block.tokred_number, geometry)
        return match_cells(x, r, geometry, drawn)


def _draw(geometry: tuple[int, int, int, int, int], device: torch.device, generator: torch.Generator) -> Tensor:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "tokred_kernels: a checkpoint around the whole model would draw other tokens from the generator when it "
            "computes the model again, and the gradients would be wrong; patch the model without generator=, or call "
            "its enable_gradient_checkpointing() instead"
        )
    return draw_places(geometry, device, generator)


def key_of(timestep: Any, device: torch.device) -> Tensor:
    """Return a number from 0 to 2^32 - 1 that the timestep, or the first of several, decides; int64, not read back."""
    first = torch.as_tensor(0 if timestep is None else timestep, device=device).reshape(-1)[:1].sum()
    return _scramble(first.float().view(torch.int32).long() & WORD)


def places(key: Tensor, block: int, geometry: tuple[int, int, int, int, int]) -> Tensor:
    """Return the place of each cell's destination in the cell, (cells,) int64, decided by the key and the block."""
    height, width, down, across, _ = geometry
    first, cells = block * BLOCK_STEP & WORD, (height // down) * (width // across)
    return _scramble(torch.arange(first, first + cells, device=key.device) & WORD ^ key) % (down * across)


def _scramble(x: Tensor) -> Tensor:
    """Map numbers from 0 to 2^32 - 1 one to one to others of that range that look random."""
    for _ in range(2):
        x = (x >> 16 ^ x) * SCRAMBLER & WORD
    return x >> 16 ^ x


class Hook:
    """A forward pre-hook that gives a module another CARRIER."""

    def __init__(self, module: Any) -> None:
        _, *names = inspect.signature(type(module).forward).parameters
        self.places = {name: place for place, name in enumerate(names)}

    def read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument of that name; None if the call or the module has none."""
        place = self.places.get(name, len(args))
        return args[place] if place < len(args) else kwargs.get(name)

    def replace(self, carried: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments with `carried` as CARRIER."""
        place = self.places[CARRIER]
        if place < len(args):
            return (*args[:place], carried, *args[place + 1 :]), kwargs
        return args, {**kwargs, CARRIER: carried}


class TellTransformers(Hook):
    """A hook of a UNet: sends the key of the timestep to its transformers, which do not get the timestep."""

    def __call__(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Hook.replace`."""
        key = key_of(self.read("timestep", args, kwargs), self.read("sample", args, kwargs).device)
        return self.replace({**(self.read(CARRIER, args, kwargs) or {}), KEY: key}, args, kwargs)


class TellBlocks(Hook):
    """A hook of a transformer: starts a `Run` and sends it to the blocks. Without settings it only removes the key."""

    def __init__(self, transformer: Any, settings: Settings | None) -> None:
        super().__init__(transformer)
        self.patch = transformer.config.patch_size or 1
        self.settings = settings

    def __call__(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Hook.replace`."""
        carried = dict(self.read(CARRIER, args, kwargs) or {})
        key = carried.pop(KEY, None)
        if self.settings is not None:
            x = self.read("hidden_states", args, kwargs)
            if key is None and self.settings.random and self.settings.generator is None:
                key = key_of(self.read("timestep", args, kwargs), x.device)
            grid = (x.shape[-2] // self.patch, x.shape[-1] // self.patch)
            carried[RUN] = Run(grid, self.settings, key)
        return self.replace(carried, args, kwargs)


class Merged:
    """A part of a block that works on merged tokens: what goes in and what comes out has them all."""

    def __init__(self, part: nn.Module, token_map: TokenMap) -> None:
        self.part = part
        self.token_map = token_map

    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x (B, N, C), and whatever else the part takes, to (B, N, C)."""
        if kwargs.get("attention_mask") is not None and kwargs.get("encoder_hidden_states") is None:
            raise NotImplementedError(
                "tokred_kernels: a block that merges tokens for self attention takes no attention_mask over them; "
                "call tokred_kernels.unpatch first"
            )
        return unmerge(self.part(merge(x, self.token_map), **kwargs), self.token_map)


class StandIn:
    """A block as its own forward sees it for one call: some parts are replaced, all else is the block's."""

    def __init__(self, block: nn.Module, parts: dict[str, Merged]) -> None:
        self.block = block
        self.parts = parts

    def __getattr__(self, name: str) -> Any:
        return self.parts[name] if name in self.parts else getattr(self.block, name)


class MergingBlock(BasicTransformerBlock):
    """diffusers' BasicTransformerBlock whose attentions and MLP may see merged tokens."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """diffusers' own, (B, N, C) to (B, N, C), with one match of `hidden_states` for all parts that merge."""
        carried = dict(cross_attention_kwargs or {})
        run: Run | None = carried.pop(RUN, None)
        if run is None:
            raise RuntimeError(
                "tokred_kernels: a patched block was called without its transformer's grid; call the model itself, "
                "model(...), not model.forward(...) or its blocks"
            )
        token_map = run.map_of(self, hidden_states)
        block: Any = self
        if token_map is not None:
            names = [name for name in run.settings.parts if getattr(self, name) is not None]
            if "ff" in names and self._chunk_size is not None:
                raise NotImplementedError(
                    "tokred_kernels: merge_mlp does not go with a feed-forward in chunks; call the model's "
                    "disable_forward_chunking(), or patch it with merge_mlp=False"
                )
            if "attn2" in names and PLACED in carried:
                raise NotImplementedError(
                    f"tokred_kernels: merge_crossattn does not go with {PLACED}, which have a place for every token; "
                    "patch the model with merge_crossattn=False"
                )
            block = StandIn(self, {name: Merged(getattr(self, name), token_map) for name in names})
        return PLAIN_FORWARD(
            block,
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            carried,
            *args,
            **kwargs,
        )


def apply(
    model: Any,
    *,
    ratio: float = 0.5,
    max_downsample: int = 1,
    stride: tuple[int, int] = (2, 2),
    random: bool = True,
    merge_attn: bool = True,
    merge_crossattn: bool = False,
    merge_mlp: bool = False,
    generator: torch.Generator | None = None,
) -> None:
    """Let diffusers' transformer blocks work on fewer tokens (ToMe for Stable Diffusion).

    Each block matches its input, before any norm, once; the parts chosen then see merged tokens (the mean of those
    that share a slot), and what they give is handed back to each of the tokens.

    Args:
        model: a diffusers UNet2DConditionModel, DiTTransformer2DModel, PixArtTransformer2DModel or Transformer2DModel,
            or a pipeline with one as its `unet` or `transformer`. Patch it before torch.compile wraps it, and before
            offloading or caching hooks are put on single blocks.
        ratio: the share of tokens to remove, in [0, 1). Only sources can go, so that more than 1 - 1 / (sy sx) is cut
            to that, for grids that the stride divides.
        max_downsample: 1, 2, 4 or 8: blocks merge whose tokens are the latent's at 1 / max_downsample of its height and
            width, or finer. Where the model cuts the latent into patches, these are what counts as 1.
        stride: height and width of the cells that have one destination each. A block whose grid is smaller than one
            cell merges nothing.
        random: True (default) draws the destination of each cell for every block and timestep, the same for all images
            of a batch. An odd batch, which holds no pairs for classifier-free guidance, takes the top left ones, as
            published. False always does.
        merge_attn: merge for self attention (attn1).
        merge_crossattn: merge for cross attention (attn2), where there is one.
        merge_mlp: merge for the MLP (ff).
        generator: for the draws. By default there is none: a hash of the timestep (of the first image) and of the
            block's position decides, so a model gives the same output for the same input, the seed of a pipeline
            decides the picture, and no random number of torch is used up. The published code continues one generator
            from picture to picture. A generator that is given draws anew at every call. It breaks torch.compile's graph
            at each draw, must be registered with a CUDA graph, and does not go with a checkpoint around the whole
            model, which raises; enable_gradient_checkpointing works.

    Raises as `patch` says; also:
        ValueError: max_downsample below the finest that the model's blocks work at, or nothing to merge for.
        NotImplementedError: a model, or a block, of another kind; nothing was patched.
        ImportError: diffusers is not installed.
    """
    root = resolve(model)
    merged = {"attn1": merge_attn, "attn2": merge_crossattn, "ff": merge_mlp}
    switches = {"random": random, "merge_attn": merge_attn, "merge_crossattn": merge_crossattn, "merge_mlp": merge_mlp}
    check_settings(ratio, max_downsample, stride, switches, generator)
    parts = tuple(name for name, wanted in merged.items() if wanted)
    transformers = transformers_within(root, max_downsample)
    blocks = [block for transformer in transformers for block in blocks_of(transformer)]
    refuse_replaced(root, (BasicTransformerBlock,), "patch the model first, and put those on after")
    if all(getattr(block, name) is None for block in blocks for name in parts):
        raise ValueError(
            "tokred_kernels.patch: merge_attn or merge_mlp must be True for a model without cross attention, got "
            "merge_crossattn=True alone"
        )
    settings = Settings(float(ratio), (stride[0], stride[1]), random, parts, generator)
    keyed = random and generator is None and root not in transformers
    if keyed:
        root.register_forward_pre_hook(TellTransformers(root), with_kwargs=True)
    for transformer, _ in downsampled(root):
        own = settings if transformer in transformers else None
        if keyed or own is not None:
            transformer.register_forward_pre_hook(TellBlocks(transformer, own), with_kwargs=True)
    for number, block in enumerate(blocks):
        block.__class__ = MergingBlock
        block.tokred_number = number
    given = {"ratio": ratio, "max_downsample": max_downsample, "stride": stride, **switches}
    setattr(root, MARK, Mark(given if generator is None else {**given, "generator": generator}))


def check_settings(ratio: Any, max_downsample: Any, stride: Any, switches: dict[str, Any], generator: Any) -> None:
    """Raise unless the settings are what `apply` says, whatever the model."""
    if isinstance(ratio, bool) or not isinstance(ratio, Real):
        raise TypeError(f"tokred_kernels.patch: ratio must be a number in [0, 1), got {ratio!r}")
    if not 0 <= float(ratio) < 1:
        raise ValueError(f"tokred_kernels.patch: ratio must be in [0, 1), got {ratio}")
    if isinstance(max_downsample, bool) or not isinstance(max_downsample, int):
        raise TypeError(f"tokred_kernels.patch: max_downsample must be 1, 2, 4 or 8, got {max_downsample!r}")
    if max_downsample not in DOWNSAMPLES:
        raise ValueError(f"tokred_kernels.patch: max_downsample must be 1, 2, 4 or 8, got {max_downsample}")
    if check_pair("patch", "stride", stride) == (1, 1):
        raise ValueError("tokred_kernels.patch: stride must leave sources in its cells, got (1, 1)")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"tokred_kernels.patch: {name} must be True or False, got {value!r}")
    if not any(value for name, value in switches.items() if name != "random"):
        raise ValueError("tokred_kernels.patch: one of merge_attn, merge_crossattn and merge_mlp must be True")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"tokred_kernels.patch: generator must be a torch.Generator or None, got {type(generator).__name__}"
        )
