# SPDX-License-Identifier: MIT
"""What patched models of all libraries have in common.

A patched module keeps its identity, parameters and hooks. Only its class changes, to a subclass of the original class.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.fx import Proxy

from tokred_kernels.models.reducer import BlockReducer
from tokred_kernels.models.spec import PATCH_INFO, REDUCER, TRACE
from tokred_kernels.models.state import ForwardTrace, TokenState
from tokred_kernels.token_map import TokenMap


class PatchInfo(NamedTuple):
    """How a model was patched, and how to undo it. Every patched model carries one.

    Attributes:
        method: the method, a dataclass of `tokred_kernels.methods`.
        modules: the names of the modules that the method added to the model or to its blocks.
    """

    method: Any
    modules: tuple[str, ...] = ()

    def __str__(self) -> str:
        return str(self.method)

    def __deepcopy__(self, memo: Any) -> PatchInfo:
        """Return the same object: it is immutable, and a process group among the settings cannot be copied."""
        return self

    def remove(self, model: nn.Module) -> None:
        """Give every module its own class back, and delete what the patch added."""
        for module in list(model.modules()):
            if isinstance(module, Patched):
                for name in (REDUCER, TRACE, PATCH_INFO):
                    module.__dict__.pop(name, None)
                for name in self.modules:
                    module._modules.pop(name, None)
                module.__class__ = module.original  # type: ignore[assignment]


class Patched:
    """Base class of the classes of patched modules; `original` is the module's own class."""

    original: type[nn.Module]

    def __prepare_scriptable__(self) -> Any:
        """Raise NotImplementedError: torch.jit.script calls this before it compiles a module."""
        raise NotImplementedError(
            f"tokred_kernels: torch.jit.script cannot compile a patched {self.original.__name__}; use torch.jit.trace "
            "or torch.export.export, or call tokred_kernels.unpatch(model) first"
        )


class ReducingBlock(Patched):
    """A pre-norm block whose reducer can remove tokens between attention and MLP."""

    tokred_reducer: BlockReducer

    def reduced(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState, TokenMap | None]:
        """Run the block on x (B, N, C), or packed (T, C); return the tokens that leave, their state and the map."""
        reducer = self.tokred_reducer
        attended, keys, importance = self.attend(x, state, reducer.prop_attn, reducer.needed_importance(x.shape[-2]))
        x = x + self.branch(1, attended, state)
        x, state, token_map = reducer.reduce(self, x, keys, importance, state)
        del attended, keys  # the keys can be a view of all of qkv, which would stay alive through the MLP
        return x + self.branch(2, self.feed(x), state), state, token_map

    def attend(self, x: Tensor, state: TokenState, prop_attn: bool, importance: str | None) -> tuple[Any, ...]:
        """Run the first norm and attention; return the output, the keys, and the importance if requested."""
        raise NotImplementedError

    def feed(self, x: Tensor) -> Tensor:
        """Run the second norm and the MLP."""
        raise NotImplementedError

    def branch(self, number: int, x: Tensor, state: TokenState) -> Tensor:
        """Apply layer scale and stochastic depth of the first or second residual branch."""
        raise NotImplementedError


class ReducingModel(Patched):
    """A model with reducing blocks; its properties describe the last forward."""

    tokred_patch: PatchInfo
    tokred_trace: ForwardTrace

    @property
    def token_map(self) -> TokenMap:
        """The map from the tokens that entered the first block, prefix included, to the final tokens.

        It is packed if images have different numbers of tokens. It is composed on first access, so a forward does not
        pay for it. In a CUDA graph its tensors belong to the graph: read them before the next replay.
        """
        return self.tokred_trace.token_map()

    @property
    def token_sizes(self) -> Tensor:
        """(B, N', 1) float32: how many of the tokens that entered each final token represents.

        (T', 1) if images have different numbers of tokens. A method with other weights returns its weights here. For a
        method that does not track sizes, they are read from the maps, so `trace=False` has none.
        """
        trace = self.tokred_trace
        if trace.entered is None:
            raise AttributeError("tokred_kernels: the model has no token_sizes before its first forward; run it once")
        return self.token_map.views()[2].float().unsqueeze(-1) if trace.state.size is None else trace.state.size

    @property
    def token_decisions(self) -> tuple[Tensor, ...]:
        """The policies (B, N) that the last forward drew, without prefix tokens: 1 for kept tokens and 0 for others.

        "dynamicvit" draws them in training, differentiable with respect to the predictors, for `nn.ratio_loss`.
        """
        return self.tokred_trace.state.decisions

    def __getattr__(self, name: str) -> Any:
        """Read a property again if its getter raised AttributeError, because nn.Module replaces the message."""
        value = getattr(ReducingModel, name, None)
        return value.__get__(self) if isinstance(value, property) else super().__getattr__(name)  # type: ignore[misc]

    def keeps_maps(self) -> bool:
        """Return whether the maps of the last forward are kept."""
        return self.tokred_patch.method.trace

    def weighs_keys(self) -> bool:
        """Return whether keys are weighed by their token's size, in attention pooling too."""
        return getattr(self.tokred_patch.method, "prop_attn", True)


def split_heads(x: Tensor, width: int) -> Tensor:
    """Reshape (..., H d) to (..., H, d) with d = `width`; unlike `unflatten`, this keeps an ONNX batch dynamic."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // width, width)


def check_not_traced_by_fx(*inputs: Any) -> None:
    """Raise NotImplementedError if torch.fx traces the call."""
    if any(isinstance(value, Proxy) for value in inputs):
        raise NotImplementedError(
            "tokred_kernels: torch.fx cannot trace a patched model, so neither can the feature extraction of timm and "
            "torchvision; use torch.export.export or forward hooks, or call tokred_kernels.unpatch(model) first"
        )
