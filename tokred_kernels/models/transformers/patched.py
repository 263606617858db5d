# SPDX-License-Identifier: MIT
"""The vision transformers of Hugging Face's transformers, patched.

They all are made alike, under different names, which `transformers_families.py` lists. A model runs its own forward,
and hands to its layers, with the keywords that it passes on, a `Flow`: what is known of the tokens of this one forward.
"""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from tokred_kernels.models.patched import (
    RECORD,
    Patched,
    ReducingBlock,
    ReducingModel,
    by_heads,
    count,
    refuse_proxy,
    weights,
)
from tokred_kernels.models.rope import of_all_tokens
from tokred_kernels.models.state import Record, State, whole
from tokred_kernels.models.transformers.families import Around, Family
from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.nn.attention import attend, size_bias
from tokred_kernels.nn.pooling import pool_sized
from tokred_kernels.patching import MARK
from tokred_kernels.token_map import TokenMap

# The keyword by which a Flow reaches the layers.
FLOW = "tokred_flow"
# How the names of transformers' own attention functions begin. Kernels of its hub have "/" in their names.
ATTENTIONS = ("eager", "sdpa", "flash_attention", "flex_attention", "paged|")


def check_attention(config: Any) -> None:
    """Raise NotImplementedError if the model runs an attention function that a patched model would not call."""
    name = config._attn_implementation
    if not (name is None or name.startswith(ATTENTIONS) or "/" in name):
        raise NotImplementedError(
            f"tokred_kernels: a patched model never calls the attention function {name!r}; call "
            'model.set_attn_implementation("sdpa") or, if nothing else will do, tokred_kernels.unpatch(model)'
        )


class Flow:
    """What is known of the tokens of one forward, as it goes on.

    It ends at the call of each layer, and is none of the arguments of its `forward`: with these checkpointing runs it
    again, and if they led to what came of them, nothing of the forward would ever be let go.

    Attributes:
        model: that runs.
        grid: of the patches that enter the first layer.
        entered: B, N and the device of the tokens that do.
        state: of the tokens that enter the next layer; None before the first.
        maps: that were followed so far.
        counts: of each layer, how many tokens its attention had, and how many left it.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.grid: tuple[int, int] | None = None
        self.entered: tuple[int, int, torch.device] | None = None
        self.state: State | None = None
        self.maps: list[TokenMap] = []
        self.counts: list[tuple[Any, Any]] = []

    def enter(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> State:
        """The state of x (B, N, C), which enter a layer, with cosines and sines of the patches if positions rotate."""
        if self.state is None:
            self.entered = (x.shape[0], x.shape[1], x.device)
            num_prefix, turned = self.model.num_prefix_tokens, None
            if rope is not None:
                cosines, sines = rope
                turned = of_all_tokens(torch.cat([sines, cosines], -1).unsqueeze(0), num_prefix)
            self.state = State(grid=self.grid, patches=x.shape[1] - num_prefix, rope=turned)
        return self.state

    def last(self) -> State:
        """The state of the final tokens."""
        return State() if self.state is None else self.state

    def record(self, *, keeps_maps: bool) -> Record:
        """What is left of the forward once it is through."""
        maps = tuple(self.maps) if keeps_maps else None
        return Record(maps, namedtuple_replace(self.last(), rope=None), self.entered, tuple(self.counts))


class OfFamily(Patched):
    """A patched module whose parts have the names of its family."""

    family: Family
    around: Around  # of models around an encoder alone


class PatchedAttention(OfFamily):
    """Self-attention that takes what travels with the tokens, and gives its keys and their importance too."""

    # transformers'.
    config: Any
    head_dim: int
    training: bool
    q_proj: Any
    k_proj: Any
    v_proj: Any

    def forward(self, x: Tensor, state: State, *, proportional: bool, importance: str | None) -> tuple[Any, ...]:
        """Attend, x (B, N, C).

        Returns:
            The same shape; None in the place where transformers returns the weights; the keys (B, H, N, d) as queries
            meet them: a view, or rotated; and their importance if requested.
        """
        layout, layers = self.family.layout, (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (by_heads(layer(x), self.head_dim).transpose(1, 2) for layer in layers)
        if state.rope is not None:
            q, k = (_turned(part, state.rope.unsqueeze(1)).type_as(v) for part in (q, k))
        y, worth = attend(
            q,
            k,
            v,
            size=state.size if proportional else None,
            policy=state.policy,
            importance=importance,
            dropout=getattr(self, layout.dropout) if self.training else 0.0,
            fused=self.config._attn_implementation != "eager",
        )
        return getattr(self, layout.out)(y.transpose(1, 2).flatten(-2)), None, k, worth


def _turned(x: Tensor, rope: Tensor) -> Tensor:
    """x (B, H, N, d), turned by sines and cosines (B, 1, N, 2 d): halves are the parts of complex numbers."""
    sines, cosines = rope.chunk(2, -1)
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([-second, first], -1) * sines


class PatchedLayer(OfFamily, ReducingBlock):
    """A layer that may remove tokens before it, and between attention and MLP, as its step says."""

    # transformers'.
    mlp: Any
    gradient_checkpointing: bool
    training: bool

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, N, C) to (B, N', C). A mask that gets here is one of all tokens, as tracers have it."""
        flow: Flow | None = kwargs.get(FLOW)
        if flow is None:
            raise RuntimeError(
                "tokred_kernels: a layer of a patched model runs within its model alone, which knows what the tokens "
                "stand for; call tokred_kernels.unpatch(model) first"
            )
        state = flow.enter(hidden_states, kwargs.get("position_embeddings"))
        x, flow.state, maps, attended = super().__call__(hidden_states, state, flow.model)  # type: ignore[misc]
        if flow.state.policy is not None and self._runs_again_without_graph():
            raise RuntimeError(
                "tokred_kernels: reentrant checkpointing drops the gradients of the policies that choose tokens; call "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
            )
        flow.maps += maps
        flow.counts.append((attended, count(x, flow.state)))
        return x

    def _runs_again_without_graph(self) -> bool:
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()):
            return False
        return getattr(self._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False)  # type: ignore[attr-defined]

    def forward(self, x: Tensor, state: State, model: Any) -> tuple[Tensor, State, tuple[TokenMap, ...], Any]:
        """x (B, N, C) and its state, to those that leave, the maps that were followed, and how many tokens attended."""
        x, state, before = self.tokred_step.enter(model, x, state)
        tokens = count(x, state)
        x, state, after = self.reduced(x, state)
        return x, state, tuple(token_map for token_map in (before, after) if token_map is not None), tokens

    def attend(self, x: Tensor, state: State, proportional: bool, importance: str | None) -> tuple[Any, ...]:
        """See `ReducingBlock`."""
        layout = self.family.layout
        attention = getattr(self, layout.attention)
        x = self._part(layout.norms[0], x)
        y, _, keys, worth = attention(x, state, proportional=proportional, importance=importance)
        return y, keys, worth

    def feed(self, x: Tensor) -> Tensor:
        """See `ReducingBlock`."""
        return self.mlp(self._part(self.family.layout.norms[1], x))

    def branch(self, number: int, x: Tensor, state: State) -> Tensor:
        """See `ReducingBlock`."""
        layout = self.family.layout
        return self._part(layout.drop, self._part(layout.scales[number - 1], x))

    def _part(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else getattr(self, name)(x)


def sides(length: Any) -> tuple[int, int]:
    """Down and across, of what a configuration has as one number or as two."""
    down, across = (length, length) if isinstance(length, int) else length
    return down, across


def grid_of(config: Any, pixels: Any) -> tuple[int, int]:
    """How many patches there are of an image of so many pixels, down and across."""
    patch = sides(config.patch_size)
    return pixels[0] // patch[0], pixels[1] // patch[1]


class PatchedEncoder(OfFamily, ReducingModel):
    """A model that runs layers; its class has the `forward` that `encoder_forward` makes."""

    # transformers'.
    config: Any

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens come before the patches."""
        return self.family.num_prefix(self.config)


class PatchedProbeEncoder(PatchedEncoder):
    """One whose head pools tokens by attention: it heeds what they stand for, and so is run by `encoder_forward`."""

    head: Any

    @property
    def use_head(self) -> bool:
        """transformers' own switch: its forward shall not run the head."""
        return False

    def pool(self, x: Tensor, size: Tensor | None) -> Tensor | None:
        """(B, C), of x (B, N', C) and sizes (B, N', 1), or what another head makes of x; None without one."""
        if not self.__dict__["use_head"]:
            return None
        heeds = size is not None and self.counts_sizes() and isinstance(self.head, PatchedProbe)
        return self.head(x, size_bias(size, x)) if heeds else self.head(x)  # type: ignore[arg-type]


class PatchedProbe(OfFamily):
    """Attention pooling by a learned query."""

    # transformers'.
    probe: Any
    attention: Any
    layernorm: Any
    mlp: Any

    def forward(self, hidden_state: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, N', C) to (B, C), with scores plus a bias (B, 1, 1, N')."""
        if bias is None:
            return super().forward(hidden_state)  # type: ignore[misc]
        probe = self.probe.repeat(hidden_state.shape[0], 1, 1)  # len() would fix the batch in an exported program
        bias = bias.expand(-1, self.attention.num_heads, -1, -1).flatten(0, 1)
        x = self.attention(probe, hidden_state, hidden_state, attn_mask=bias, need_weights=False)[0]
        return (x + self.mlp(self.layernorm(x)))[:, 0]


def _by_name(original: type[nn.Module]) -> Any:
    """Let a function be the forward of `original` to who asks, and get all arguments of a call by their names."""
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
    """The forward of a patched `original`: its own, with a Flow that becomes the record."""

    @_by_name(original)
    def forward(self: Any, **kwargs: Any) -> Any:
        refuse_proxy(*kwargs.values())
        check_attention(self.config)
        attentions = kwargs.get("output_attentions")
        if getattr(self.config, "output_attentions", False) if attentions is None else attentions:
            raise NotImplementedError(
                "tokred_kernels: a patched model gives no attentions, which are never written out; call "
                "tokred_kernels.unpatch(model) first"
            )
        if kwargs.get("attention_mask") is not None:
            raise NotImplementedError(
                "tokred_kernels: a patched model takes no attention_mask, for its tokens change from layer to layer; "
                "call tokred_kernels.unpatch(model) first"
            )
        flow = kwargs.pop(FLOW, None) or Flow()
        flow.model = self
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is not None:
            flow.grid = grid_of(self.config, [whole(side) for side in pixel_values.shape[-2:]])
        as_tuple = not _returns_dict(self, kwargs)
        outputs = original.forward(self, **kwargs, **{FLOW: flow}, return_dict=True)
        x = outputs.last_hidden_state
        if isinstance(self, PatchedProbeEncoder):
            outputs.pooler_output = self.pool(x, flow.last().size)
        record = flow.record(keeps_maps=self.keeps_maps())
        record.remember(x)
        setattr(self, RECORD, record)
        return outputs.to_tuple() if as_tuple else outputs

    return forward


class PatchedWrapper(OfFamily):
    """A model around an encoder that takes no more of its tokens than what it was pooled to."""

    def __getattr__(self, name: str) -> Any:
        """The mark and what is known of the last forward are the encoder's."""
        if name in OF_THE_ENCODER:
            return getattr(getattr(self, self.around.encoder), name)
        return super().__getattr__(name)  # type: ignore[misc]


# What a wrapper has of its encoder: the mark, and the properties of `ReducingModel`.
OF_THE_ENCODER = (MARK, *(name for name, value in vars(ReducingModel).items() if isinstance(value, property)))


class PatchedMeanClassifier(PatchedWrapper):
    """An image classifier that takes the mean of the tokens; its class has what `classifier_forward` makes."""

    def pool(self, x: Tensor, weight: Tensor | None, begin: int) -> Tensor:
        """What the classifier takes, of x (B, N', C) after the first tokens, which count (B, N', 1)."""
        mean = x[:, begin:].mean(1) if weight is None else pool_sized(x, weight, kind="avg", begin=begin)
        return torch.cat([x[:, 0], mean], 1) if self.around.class_token else mean


def classifier_forward(original: type[nn.Module], output: Any) -> Any:
    """The forward of a patched `original`, a classifier that takes a mean: it counts tokens by what they stand for."""

    @_by_name(original)
    def forward(self: Any, **kwargs: Any) -> Any:
        encoder = getattr(self, self.around.encoder)
        patched = encoder if isinstance(encoder, PatchedEncoder) else _inside(encoder)
        if patched is None:  # any more: the encoder was unpatched by itself
            return original.forward(self, **kwargs)
        as_tuple = not _returns_dict(self, kwargs)
        labels, flow = kwargs.pop("labels", None), Flow()
        outputs = encoder(**kwargs, **{FLOW: flow}, return_dict=True)
        pooled = self.pool(outputs.last_hidden_state, weights(flow.last()), patched.num_prefix_tokens)
        logits = self.classifier(pooled)
        others = kwargs if self.around.loss_takes_all else {}
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **others)
        result = output(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)
        return result.to_tuple() if as_tuple else result

    return forward


def _inside(wrapped: nn.Module) -> PatchedEncoder | None:
    """The patched encoder in what a compiler or the like has made of it, if there is one."""
    patched = [part for part in wrapped.modules() if isinstance(part, PatchedEncoder)]
    return patched[0] if patched else None


def _returns_dict(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether outputs have names; takes that keyword out of `kwargs`."""
    wanted = kwargs.pop("return_dict", None)
    return model.config.return_dict if wanted is None else wanted
