# SPDX-License-Identifier: MIT
"""diffusers' transformer blocks, patched to run their parts on merged tokens.

A patched block runs diffusers' own forward on a `BlockProxy`, whose attentions and MLP merge their input and unmerge
their output. The state of one run (the grid, the maps) travels with the arguments of the blocks, and no module stores
it: patched models are safe to checkpoint, to compile, and to call from several threads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokred_kernels.models.diffusers.blocks import BasicTransformerBlock, downsampled
from tokred_kernels.models.patched import PatchInfo
from tokred_kernels.models.spec import PATCH_INFO, check_not_replaced
from tokred_kernels.ops.merge import merge
from tokred_kernels.ops.unmerge import unmerge
from tokred_kernels.token_map import TokenMap

# Read from the class once: torch.compile does not trace into a class that diffusers marks as allowed in graphs.
ORIGINAL_FORWARD: Any = BasicTransformerBlock.forward
# The argument of a transformer's forward that reaches its blocks unchanged, also through a checkpoint.
CARRIER = "cross_attention_kwargs"
# The keys that a patch adds to CARRIER.
RUN, SEED = "tokred_run", "tokred_seed"
# An argument of attention with an entry for every token.
IP_ADAPTER_MASKS = "ip_adapter_masks"


class MergeRun(Protocol):
    """One run of the blocks of one transformer.

    Attributes:
        parts: the names of the parts of a block that run on merged tokens.
    """

    parts: tuple[str, ...]

    def map_of(self, block: Any, x: Tensor) -> TokenMap | None:
        """Return the map of the tokens (B, N, C) that enter `block`; None if all stay."""


# Makes the run of a transformer from the grid of its tokens, the seed of the timestep, and that timestep.
StartRun = Callable[[tuple[int, int], "Tensor | None", Any, torch.device], MergeRun]


class MergingPatchInfo(PatchInfo):
    """The `PatchInfo` of a diffusers model."""

    def remove(self, model: nn.Module) -> None:
        """Give every block its own class back, and remove the hooks."""
        check_not_replaced(model, (MergingBlock,), "remove those again before you call tokred_kernels.unpatch")
        for module in model.modules():
            if type(module) is MergingBlock:
                module.__class__ = BasicTransformerBlock  # type: ignore[assignment]
                module.__dict__.pop("tokred_number", None)
            hooks = [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, CarrierHook)]
            for key in hooks:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        delattr(model, PATCH_INFO)


def install(
    root: Any,
    info: MergingPatchInfo,
    transformers: list[Any],
    blocks: list[Any],
    start_run: StartRun,
    seed_of: Callable[[Any, torch.device], Tensor] | None,
) -> None:
    """Patch the `blocks` of `transformers` inside `root`; `seed_of` makes a seed of the timestep if runs need one."""
    seeded = seed_of is not None and root not in transformers
    if seeded and seed_of is not None:
        root.register_forward_pre_hook(SendSeed(root, seed_of), with_kwargs=True)
    for transformer, _ in downsampled(root):
        own = start_run if transformer in transformers else None
        if seeded or own is not None:
            transformer.register_forward_pre_hook(SendRun(transformer, own), with_kwargs=True)
    for number, block in enumerate(blocks):
        block.__class__ = MergingBlock
        block.tokred_number = number
    setattr(root, PATCH_INFO, info)


class CarrierHook:
    """A forward pre-hook that changes the argument CARRIER of a module."""

    def __init__(self, module: Any) -> None:
        _, *names = inspect.signature(type(module).forward).parameters
        self.positions = {name: position for position, name in enumerate(names)}

    def read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the argument of this name; None if the call or the module has none."""
        position = self.positions.get(name, len(args))
        return args[position] if position < len(args) else kwargs.get(name)

    def replace(self, carried: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments with `carried` as CARRIER."""
        position = self.positions[CARRIER]
        if position < len(args):
            return (*args[:position], carried, *args[position + 1 :]), kwargs
        return args, {**kwargs, CARRIER: carried}


class SendSeed(CarrierHook):
    """A hook of a UNet: send the seed of the timestep to its transformers, which do not get the timestep."""

    def __init__(self, unet: Any, seed_of: Callable[[Any, torch.device], Tensor]) -> None:
        super().__init__(unet)
        self.seed_of = seed_of

    def __call__(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `CarrierHook.replace`."""
        seed = self.seed_of(self.read("timestep", args, kwargs), self.read("sample", args, kwargs).device)
        return self.replace({**(self.read(CARRIER, args, kwargs) or {}), SEED: seed}, args, kwargs)


class SendRun(CarrierHook):
    """A hook of a transformer: start a run and send it to the blocks. Without `start_run`, only remove the seed."""

    def __init__(self, transformer: Any, start_run: StartRun | None) -> None:
        super().__init__(transformer)
        self.patch_size = transformer.config.patch_size or 1
        self.start_run = start_run

    def __call__(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `CarrierHook.replace`."""
        carried = dict(self.read(CARRIER, args, kwargs) or {})
        seed = carried.pop(SEED, None)
        if self.start_run is not None:
            x = self.read("hidden_states", args, kwargs)
            grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
            carried[RUN] = self.start_run(grid, seed, self.read("timestep", args, kwargs), x.device)
        return self.replace(carried, args, kwargs)


class MergedPart:
    """A part of a block that runs on merged tokens; its input and output have all tokens."""

    def __init__(self, part: nn.Module, token_map: TokenMap) -> None:
        self.part = part
        self.token_map = token_map

    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Run the part on x (B, N, C) and its other arguments; return (B, N, C)."""
        if kwargs.get("attention_mask") is not None and kwargs.get("encoder_hidden_states") is None:
            raise NotImplementedError(
                "tokred_kernels: a block that merges tokens for self attention does not support an attention_mask over "
                "them; call tokred_kernels.unpatch first"
            )
        return unmerge(self.part(merge(x, self.token_map), **kwargs), self.token_map)


class BlockProxy:
    """A block during one call of its forward: some parts are replaced, and all other attributes are the block's."""

    def __init__(self, block: nn.Module, parts: dict[str, MergedPart]) -> None:
        self.block = block
        self.parts = parts

    def __getattr__(self, name: str) -> Any:
        return self.parts[name] if name in self.parts else getattr(self.block, name)


class MergingBlock(BasicTransformerBlock):
    """diffusers' BasicTransformerBlock, whose attentions and MLP can run on merged tokens."""

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
        """Run diffusers' forward, (B, N, C) to (B, N, C), with one match of `hidden_states` for all parts."""
        carried = dict(cross_attention_kwargs or {})
        run: MergeRun | None = carried.pop(RUN, None)
        if run is None:
            raise RuntimeError(
                "tokred_kernels: a patched block was called without its transformer's grid; call the model itself, "
                "model(...), not model.forward(...) or its blocks"
            )
        token_map = run.map_of(self, hidden_states)
        block: Any = self
        if token_map is not None:
            names = [name for name in run.parts if getattr(self, name) is not None]
            if "ff" in names and self._chunk_size is not None:
                raise NotImplementedError(
                    "tokred_kernels: merge_mlp does not support a chunked feed-forward; call the model's "
                    "disable_forward_chunking(), or patch it with merge_mlp=False"
                )
            if "attn2" in names and IP_ADAPTER_MASKS in carried:
                raise NotImplementedError(
                    f"tokred_kernels: merge_crossattn does not support {IP_ADAPTER_MASKS}, which have an entry for "
                    "every token; patch the model with merge_crossattn=False"
                )
            block = BlockProxy(self, {name: MergedPart(getattr(self, name), token_map) for name in names})
        return ORIGINAL_FORWARD(
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
