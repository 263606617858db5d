# SPDX-License-Identifier: MIT
"""Patched classes of the vision transformers of Hugging Face's transformers.

All families have the same structure with different names, which `families.py` lists. A model runs its own forward and
passes a `TokenFlow`, the state of this forward's tokens, to its layers as a keyword argument.
"""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from tokred_kernels.models.patched import (
    Patched,
    ReducingBlock,
    ReducingModel,
    check_not_traced_by_fx,
    split_heads,
)
from tokred_kernels.models.rope import prepend_prefix_rope
from tokred_kernels.models.spec import PATCH_INFO, TRACE
from tokred_kernels.models.state import ForwardTrace, TokenState, count_tokens, int_size, pooling_weights
from tokred_kernels.models.transformers.families import Family, Wrapper
from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.nn.attention import attend, size_bias
from tokred_kernels.nn.pooling import pool_sized
from tokred_kernels.token_map import TokenMap

# The keyword argument that passes a TokenFlow to the layers.
FLOW = "tokred_flow"
# Prefixes of the names of transformers' own attention functions. Kernels of its hub have "/" in their names.
ATTENTIONS = ("eager", "sdpa", "flash_attention", "flex_attention", "paged|")


def check_attention(config: Any) -> None:
    """Raise NotImplementedError if the model runs an attention function that a patched model would not call."""
    name = config._attn_implementation
    if not (name is None or name.startswith(ATTENTIONS) or "/" in name):
        raise NotImplementedError(
            f"tokred_kernels: a patched model does not call the attention function {name!r}; call "
            'model.set_attn_implementation("sdpa"), or tokred_kernels.unpatch(model)'
        )


class TokenFlow:
    """The state of the tokens during one forward.

    Each layer's `__call__` reads and updates it, and does not pass it to the layer's `forward`: checkpointing keeps
    those arguments, and a reference from them to the results would keep the whole forward alive.

    Attributes:
        model: the running model.
        grid: the grid of the patches that enter the first layer.
        entered: (B, N, device) of the tokens that enter the first layer.
        state: the state of the tokens that enter the next layer; None before the first.
        maps: the map of each reduction so far.
        counts: for each layer, the tokens in its attention and the tokens that left it.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.grid: tuple[int, int] | None = None
        self.entered: tuple[int, int, torch.device] | None = None
        self.state: TokenState | None = None
        self.maps: list[TokenMap] = []
        self.counts: list[tuple[Any, Any]] = []

    def enter(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> TokenState:
        """Return the state of x (B, N, C) that enters a layer; `rope` has the cosines and sines of the patches."""
        if self.state is None:
            self.entered = (x.shape[0], x.shape[1], x.device)
            num_prefix, rotation = self.model.num_prefix_tokens, None
            if rope is not None:
                cosines, sines = rope
                rotation = prepend_prefix_rope(torch.cat([sines, cosines], -1).unsqueeze(0), num_prefix)
            self.state = TokenState(grid=self.grid, patches=x.shape[1] - num_prefix, rope=rotation)
        return self.state

    def last(self) -> TokenState:
        """Return the state of the final tokens."""
        return TokenState() if self.state is None else self.state

    def trace(self, *, keeps_maps: bool) -> ForwardTrace:
        """Return the trace of the finished forward."""
        maps = tuple(self.maps) if keeps_maps else None
        return ForwardTrace(maps, namedtuple_replace(self.last(), rope=None), self.entered, tuple(self.counts))


class FamilyModule(Patched):
    """A patched module whose parts have the names of its family."""

    family: Family
    wrapper: Wrapper  # only for models around an encoder


class PatchedAttention(FamilyModule):
    """Self-attention that also returns its keys and their importance."""

    # Attributes of the class of transformers.
    config: Any
    head_dim: int
    training: bool
    q_proj: Any
    k_proj: Any
    v_proj: Any

    def forward(self, x: Tensor, state: TokenState, *, prop_attn: bool, importance: str | None) -> tuple[Any, ...]:
        """Attend on x (B, N, C).

        Returns:
            The output, in the shape of x; None where transformers returns the weights; the keys (B, H, N, d) after
            rotation; and their importance if requested.
        """
        layout, layers = self.family.layout, (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (split_heads(layer(x), self.head_dim).transpose(1, 2) for layer in layers)
        if state.rope is not None:
            q, k = (_rotate(part, state.rope.unsqueeze(1)).type_as(v) for part in (q, k))
        y, importance_of_keys = attend(
            q,
            k,
            v,
            size=state.size if prop_attn else None,
            policy=state.policy,
            importance=importance,
            dropout=getattr(self, layout.dropout) if self.training else 0.0,
            fused=self.config._attn_implementation != "eager",
        )
        return getattr(self, layout.out)(y.transpose(1, 2).flatten(-2)), None, k, importance_of_keys


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate x (B, H, N, d) by sines and cosines (B, 1, N, 2 d): its halves are real and imaginary parts."""
    sines, cosines = rope.chunk(2, -1)
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([-second, first], -1) * sines


class PatchedLayer(FamilyModule, ReducingBlock):
    """A layer whose reducer can remove tokens before it, and between attention and MLP."""

    # Attributes of the class of transformers.
    mlp: Any
    gradient_checkpointing: bool
    training: bool

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map (B, N, C) to (B, N', C). Tracers pass a mask of all ones, which is ignored."""
        flow: TokenFlow | None = kwargs.get(FLOW)
        if flow is None:
            raise RuntimeError(
                "tokred_kernels: only the patched model itself can call its layers, because it tracks the state of the "
                "tokens; call the model, or call tokred_kernels.unpatch(model) first"
            )
        state = flow.enter(hidden_states, kwargs.get("position_embeddings"))
        x, flow.state, maps, attended = super().__call__(hidden_states, state, flow.model)  # type: ignore[misc]
        if flow.state.policy is not None and self._is_reentrant_checkpoint():
            raise RuntimeError(
                "tokred_kernels: reentrant checkpointing drops the gradients of the token policies; call "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
            )
        flow.maps += maps
        flow.counts.append((attended, count_tokens(x, flow.state)))
        return x

    def _is_reentrant_checkpoint(self) -> bool:
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return False
        return getattr(self._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False)  # type: ignore[attr-defined]

    def forward(self, x: Tensor, state: TokenState, model: Any) -> tuple[Tensor, TokenState, tuple[TokenMap, ...], Any]:
        """Run on x (B, N, C); return the tokens that leave, their state, the maps, and how many tokens attended."""
        x, state, before = self.tokred_reducer.before_block(model, x, state)
        tokens = count_tokens(x, state)
        x, state, after = self.reduced(x, state)
        return x, state, tuple(token_map for token_map in (before, after) if token_map is not None), tokens

    def attend(self, x: Tensor, state: TokenState, prop_attn: bool, importance: str | None) -> tuple[Any, ...]:
        """See `ReducingBlock`."""
        layout = self.family.layout
        attention = getattr(self, layout.attention)
        x = self._part(layout.norms[0], x)
        y, _, keys, importance_of_keys = attention(x, state, prop_attn=prop_attn, importance=importance)
        return y, keys, importance_of_keys

    def feed(self, x: Tensor) -> Tensor:
        """See `ReducingBlock`."""
        return self.mlp(self._part(self.family.layout.norms[1], x))

    def branch(self, number: int, x: Tensor, state: TokenState) -> Tensor:
        """See `ReducingBlock`."""
        layout = self.family.layout
        return self._part(layout.drop, self._part(layout.scales[number - 1], x))

    def _part(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else getattr(self, name)(x)


def sides(length: Any) -> tuple[int, int]:
    """Return the (height, width) that a configuration stores as one number or as two."""
    height, width = (length, length) if isinstance(length, int) else length
    return height, width


def grid_of(config: Any, pixels: Any) -> tuple[int, int]:
    """Return the (rows, columns) of patches in an image of `pixels`, (height, width)."""
    patch = sides(config.patch_size)
    return pixels[0] // patch[0], pixels[1] // patch[1]


class PatchedEncoder(FamilyModule, ReducingModel):
    """A model that runs the layers; `encoder_forward` makes its `forward`."""

    # Attributes of the class of transformers.
    config: Any

    @property
    def num_prefix_tokens(self) -> int:
        """The number of tokens before the patches."""
        return self.family.num_prefix(self.config)


class PatchedProbeEncoder(PatchedEncoder):
    """An encoder with attention pooling, which `encoder_forward` runs because it needs the token sizes."""

    head: Any

    @property
    def use_head(self) -> bool:
        """The switch of transformers, which is off so that its forward does not run the head."""
        return False

    def pool(self, x: Tensor, size: Tensor | None) -> Tensor | None:
        """Return the head's output for x (B, N', C) and sizes (B, N', 1); None without a head."""
        if not self.__dict__["use_head"]:
            return None
        weighs = size is not None and self.weighs_keys() and isinstance(self.head, PatchedProbe)
        return self.head(x, size_bias(size, x)) if weighs else self.head(x)  # type: ignore[arg-type]


class PatchedProbe(FamilyModule):
    """Attention pooling by a learned query."""

    # Attributes of the class of transformers.
    probe: Any
    attention: Any
    layernorm: Any
    mlp: Any

    def forward(self, hidden_state: Tensor, bias: Tensor | None = None) -> Tensor:
        """Pool (B, N', C) to (B, C), with a bias (B, 1, 1, N') on the scores."""
        if bias is None:
            return super().forward(hidden_state)  # type: ignore[misc]
        probe = self.probe.repeat(hidden_state.shape[0], 1, 1)  # len() would fix the batch size in an exported program
        bias = bias.expand(-1, self.attention.num_heads, -1, -1).flatten(0, 1)
        x = self.attention(probe, hidden_state, hidden_state, attn_mask=bias, need_weights=False)[0]
        return (x + self.mlp(self.layernorm(x)))[:, 0]


def _by_name(original: type[nn.Module]) -> Any:
    """Give a function the signature of `original.forward`, and pass it all arguments as keywords."""
    forward: Any = original.forward
    _, *parameters = inspect.signature(forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]

    def decorate(function: Any) -> Any:
        @wraps(forward)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(args) > len(names):
                raise TypeError(f"{type(self).__name__} takes at most {len(names)} arguments, got {len(args)}")
            return function(self, **dict(zip(names[: len(args)], args, strict=True)), **kwargs)

        return call

    return decorate


def encoder_forward(original: type[nn.Module]) -> Any:
    """Return the forward of a patched `original`: its own, with a TokenFlow that becomes the trace."""

    @_by_name(original)
    def forward(self: Any, **kwargs: Any) -> Any:
        check_not_traced_by_fx(*kwargs.values())
        check_attention(self.config)
        attentions = kwargs.get("output_attentions")
        if getattr(self.config, "output_attentions", False) if attentions is None else attentions:
            raise NotImplementedError(
                "tokred_kernels: a patched model cannot return attentions, which it never materializes; call "
                "tokred_kernels.unpatch(model) first"
            )
        if kwargs.get("attention_mask") is not None:
            raise NotImplementedError(
                "tokred_kernels: a patched model does not support attention_mask, because its tokens change from layer "
                "to layer; call tokred_kernels.unpatch(model) first"
            )
        flow = kwargs.pop(FLOW, None) or TokenFlow()
        flow.model = self
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is not None:
            flow.grid = grid_of(self.config, [int_size(side) for side in pixel_values.shape[-2:]])
        as_tuple = not _returns_dict(self, kwargs)
        outputs = original.forward(self, **kwargs, **{FLOW: flow}, return_dict=True)
        x = outputs.last_hidden_state
        if isinstance(self, PatchedProbeEncoder):
            outputs.pooler_output = self.pool(x, flow.last().size)
        trace = flow.trace(keeps_maps=self.keeps_maps())
        trace.set_output(x)
        setattr(self, TRACE, trace)
        return outputs.to_tuple() if as_tuple else outputs

    return forward


class PatchedWrapper(FamilyModule):
    """A model around an encoder that uses only the encoder's pooled output."""

    def __getattr__(self, name: str) -> Any:
        """Read the patch info and the properties of the last forward from the encoder."""
        if name in ENCODER_ATTRIBUTES:
            return getattr(getattr(self, self.wrapper.encoder), name)
        return super().__getattr__(name)  # type: ignore[misc]


# What a wrapper reads from its encoder: the patch info, and the properties of `ReducingModel`.
ENCODER_ATTRIBUTES = (PATCH_INFO, *(name for name, value in vars(ReducingModel).items() if isinstance(value, property)))


class PatchedMeanClassifier(PatchedWrapper):
    """An image classifier on the mean of the tokens; `classifier_forward` makes its `forward`."""

    def pool(self, x: Tensor, weight: Tensor | None, begin: int) -> Tensor:
        """Return the classifier's input: the mean of x (B, N', C) after `begin` tokens, weighted by (B, N', 1)."""
        mean = x[:, begin:].mean(1) if weight is None else pool_sized(x, weight, kind="avg", begin=begin)
        return torch.cat([x[:, 0], mean], 1) if self.wrapper.class_token else mean


def classifier_forward(original: type[nn.Module], output: Any) -> Any:
    """Return the forward of a patched `original`, a classifier on a mean, which weighs tokens by their size."""

    @_by_name(original)
    def forward(self: Any, **kwargs: Any) -> Any:
        encoder = getattr(self, self.wrapper.encoder)
        patched = encoder if isinstance(encoder, PatchedEncoder) else _inside(encoder)
        if patched is None:  # the encoder was unpatched without its classifier
            return original.forward(self, **kwargs)
        as_tuple = not _returns_dict(self, kwargs)
        labels, flow = kwargs.pop("labels", None), TokenFlow()
        outputs = encoder(**kwargs, **{FLOW: flow}, return_dict=True)
        pooled = self.pool(outputs.last_hidden_state, pooling_weights(flow.last()), patched.num_prefix_tokens)
        logits = self.classifier(pooled)
        others = kwargs if self.wrapper.loss_takes_all else {}
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **others)
        result = output(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        return result.to_tuple() if as_tuple else result

    return forward


def _inside(wrapped: nn.Module) -> PatchedEncoder | None:
    """Return the patched encoder inside a wrapper such as a compiled module, or None."""
    patched = [part for part in wrapped.modules() if isinstance(part, PatchedEncoder)]
    return patched[0] if patched else None


def _returns_dict(model: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether outputs are dicts; removes the keyword `return_dict` from `kwargs`."""
    wanted = kwargs.pop("return_dict", None)
    return model.config.return_dict if wanted is None else wanted
