# SPDX-License-Identifier: MIT
"""What patched models have in common, whichever library they are of.

A patched module keeps its object, parameters and hooks, and takes a class of ours that derives from its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Proxy

from tokred_kernels.models.state import Record, State, Step
from tokred_kernels.patching import MARK
from tokred_kernels.token_map import TokenMap

STEP = "tokred_step"  # what a patched block does
RECORD = "tokred_record"


class Mark(NamedTuple):
    """What was put into a model. A model that carries one is patched.

    Attributes:
        method: its name.
        settings: as they were given.
        modules: the names of the modules that it put into the model, or into its blocks.
    """

    method: str
    settings: dict[str, Any]
    modules: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join([f'"{self.method}"', *(f"{name}={value!r}" for name, value in self.settings.items())])

    def __deepcopy__(self, memo: Any) -> Mark:
        """The same: it never changes, and a process group among the settings has no copy."""
        return self

    def remove(self, model: nn.Module) -> None:
        """Give every module its own class back, and drop what we left in them."""
        for module in list(model.modules()):
            if isinstance(module, Patched):
                for name in (STEP, RECORD, MARK):
                    module.__dict__.pop(name, None)
                for name in self.modules:
                    module._modules.pop(name, None)
                module.__class__ = module.original  # type: ignore[assignment]


class Patched:
    """The mark of the classes that modules take while they are patched; `original` is the one they had."""

    original: type[nn.Module]

    def __prepare_scriptable__(self) -> Any:
        """Raise NotImplementedError: torch.jit.script calls this before it compiles a module."""
        raise NotImplementedError(
            f"tokred_kernels: torch.jit.script cannot compile a patched {self.original.__name__}; use torch.jit.trace "
            "or torch.export.export, or call tokred_kernels.unpatch(model) first"
        )


class ReducingBlock(Patched):
    """A pre-norm block that may remove tokens between attention and MLP, as its step says."""

    tokred_step: Step

    def reduced(self, x: Tensor, state: State) -> tuple[Tensor, State, TokenMap | None]:
        """x (B, N, C), or packed (T, C), and its state, to those that leave, and the map that was followed, if any."""
        step = self.tokred_step
        attended, keys, importance = self.attend(x, state, step.proportional, step.importance(x.shape[-2]))
        x = x + self.branch(1, attended, state)
        x, state, token_map = step.reduce(self, x, keys, importance, state)
        del attended, keys  # the keys may be a view of all of qkv, which would else live on through the MLP
        return x + self.branch(2, self.feed(x), state), state, token_map

    def attend(self, x: Tensor, state: State, proportional: bool, importance: str | None) -> tuple[Any, ...]:
        """The first norm and attention: the same shape, the keys, and their importance, where it is wanted."""
        raise NotImplementedError

    def feed(self, x: Tensor) -> Tensor:
        """The second norm and the MLP."""
        raise NotImplementedError

    def branch(self, number: int, x: Tensor, state: State) -> Tensor:
        """What the first or second residual branch does with what it adds: scales it, drops some of it."""
        raise NotImplementedError


class ReducingModel(Patched):
    """A model whose blocks may remove tokens: what it tells of its last forward."""

    tokred_patch: Mark
    tokred_record: Record

    @property
    def token_map(self) -> TokenMap:
        """From the tokens that entered the first block, prefix included, to the final ones, in the last forward.

        Packed where every image has a count of its own. Composed when it is asked for, so a forward pays nothing for
        it. In a CUDA graph its tensors are the graph's, as outputs are: take them before the next replay.
        """
        return self.tokred_record.token_map()

    @property
    def token_sizes(self) -> Tensor:
        """(B, N', 1) float32: how many of the tokens that entered each final token stands for, in the last forward.

        (T', 1) where every image has a count of its own. A method that weighs its tokens otherwise gives its weights.
        One that does not track sizes leaves them to the maps, which `trace=False` does not keep.
        """
        record = self.tokred_record
        if record.entered is None:
            raise AttributeError("tokred_kernels: the model has no token_sizes before its first forward; run it once")
        return self.token_map.views()[2].float().unsqueeze(-1) if record.state.size is None else record.state.size

    @property
    def token_decisions(self) -> tuple[Tensor, ...]:
        """Of each layer that drew one in the last forward, its policy (B, N) without prefix tokens: 1 is kept, 0 not.

        "dynamicvit" draws them when training, differentiable by the predictors' parameters, for `nn.ratio_loss`.
        """
        return self.tokred_record.state.decisions

    def __getattr__(self, name: str) -> Any:
        """Read a property again whose getter raised AttributeError, for nn.Module would replace the message."""
        value = getattr(ReducingModel, name, None)
        return value.__get__(self) if isinstance(value, property) else super().__getattr__(name)  # type: ignore[misc]

    def keeps_maps(self) -> bool:
        """Whether the maps of the last forward are kept."""
        return self.tokred_patch.settings.get("trace", True)

    def counts_sizes(self) -> bool:
        """Whether keys count as often as the tokens they stand for, also where tokens are pooled by attention."""
        return self.tokred_patch.settings.get("prop_attn", True)


def by_heads(x: Tensor, width: int) -> Tensor:
    """x (..., H d) as (..., H, d), d being `width`. `unflatten` does the same, but fixes the batch of an ONNX file."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // width, width)


def refuse_proxy(*inputs: Any) -> None:
    """Raise NotImplementedError if torch.fx traces the call."""
    if any(isinstance(value, Proxy) for value in inputs):
        raise NotImplementedError(
            "tokred_kernels: torch.fx cannot trace a patched model, so neither can the feature extraction of timm and "
            "torchvision; use torch.export.export or forward hooks, or call tokred_kernels.unpatch(model) first"
        )


def count(x: Tensor, state: State) -> int | tuple[int, ...]:
    """How many tokens an image has; of packed ones, each image."""
    return x.shape[1] if state.packing is None else state.packing.lengths


def weights(state: State) -> Tensor | None:
    """(B, N, 1), how much each final token counts in a mean; None for 1 each."""
    if state.policy is None:
        return state.size
    kept = state.policy.unsqueeze(-1)
    return kept if state.size is None else kept * state.size
