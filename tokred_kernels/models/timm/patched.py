# SPDX-License-Identifier: MIT
"""What all of timm's transformers that are patched share, whatever their blocks are made of.

A patched module keeps its object, parameters and hooks, and takes a class of ours that derives from its own. Blocks
pass on `(x, state, token_map)`, so that the state of one forward is in its local variables alone: safe to compile, to
checkpoint and to export. Only the finished forward leaves a record in the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokred_kernels.models.imports import import_timm
from tokred_kernels.models.patched import Patched, ReducingBlock, ReducingModel, by_heads, count, refuse_proxy, weights
from tokred_kernels.models.state import Record, State, whole
from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.nn.attention import attend, size_bias
from tokred_kernels.nn.pooling import image_of_row, pool_packed, pool_sized
from tokred_kernels.packing import Packing
from tokred_kernels.token_map import TokenMap

import_timm()

from timm.layers import apply_rot_embed_cat  # noqa: E402
from timm.models._manipulate import checkpoint  # noqa: E402

# How a model may make one vector of its tokens, if those that are masked shall have no part in it.
MASKED_POOLS = ("token", "avg", "")
AS_IT_IS = "hand over what forward_features returned, as it is, before the model is run again, or call the whole model"


class PatchedSelfAttention(Patched):
    """Self-attention that takes what travels with the tokens, and gives its keys and their importance too."""

    # Of timm's.
    num_heads: int
    fused_attn: bool
    training: bool
    qkv: Any
    q_norm: Any
    k_norm: Any
    attn_drop: Any
    norm: Any
    proj: Any
    proj_drop: Any
    rotate_half = False  # EvaAttention and AttentionRope have their own, from timm 1.0.20 on

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of tokens (..., C), (..., H, d) each; of keys and values there may be fewer."""
        if self.qkv is None:
            layers = (getattr(self, f"{name}_proj") for name in "qkv")
            return tuple(by_heads(layer(x), head_width(self)) for layer in layers)
        return self.split(self.qkv(x))

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(..., 3 H d), to three of (..., H, d)."""
        return by_heads(qkv, qkv.shape[-1] // (3 * self.num_heads)).chunk(3, -2)

    def forward(
        self,
        x: Tensor,
        size: Tensor | None = None,
        policy: Tensor | None = None,
        packing: Packing | None = None,
        importance: str | None = None,
        rope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attend, x (B, N, C), or packed (T, C), with `State.rope`; the others are those of `nn.attention.attend`.

        Returns:
            The same shape, the keys (B, H, N, d), or (T, H, d), as queries meet them: a view, or rotated; and their
            importance, where it was asked for.
        """
        q, k, v = self.heads(x)
        if packing is None:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            rope = rope.unsqueeze(1)  # of heads, which come after packed tokens, and before others
            layout = {"half": True} if self.rotate_half else {}
            q, k = (apply_rot_embed_cat(part, rope, **layout).type_as(v) for part in (q, k))
        keys, heads = k, 1 if packing is None else -2
        if k.shape[heads] != self.num_heads:
            k, v = (part.repeat_interleave(self.num_heads // part.shape[heads], dim=heads) for part in (k, v))
        wanted: Any = {"size": size, "policy": policy, "packed": packing, "importance": importance}
        fused = self.fused_attn and not _is_hooked(self.attn_drop)
        wanted["dropout"] = self.attn_drop.p if fused and self.training else 0.0
        y, worth = attend(q, k, v, **wanted, fused=fused, drop=self.attn_drop)
        if packing is None:
            y = y.transpose(1, 2)
        y = self.norm(y.flatten(-2))
        gate = getattr(self, "gate", None)  # older timm has none
        if gate is not None:
            y = y * gate(x).sigmoid()
        return self.proj_drop(self.proj(y)), keys, worth


def _is_hooked(module: nn.Module) -> bool:
    """Return whether a call of the module runs hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class PatchedPreNormBlock(ReducingBlock):
    """timm's blocks, patched."""

    # Of timm's.
    attn: Any
    mlp: Any
    norm1: Any
    norm2: Any
    drop_path1: Any
    drop_path2: Any

    def scale(self, branch: int, x: Tensor) -> Tensor:
        """The layer scale of the first or second residual branch."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State, TokenMap | None]:
        """See `reduced`.

        Raises:
            RuntimeError: the block was called without the state that its model passes on.
        """
        if state is None:
            raise RuntimeError(
                "tokred_kernels: the blocks of a patched model run within the model only, which tracks what each token "
                "stands for; call model.forward_features(images) instead of model.blocks(tokens), or call "
                "tokred_kernels.unpatch(model) first"
            )
        return self.reduced(x, state)

    def attend(self, x: Tensor, state: State, proportional: bool, importance: str | None) -> tuple[Any, ...]:
        """See `ReducingBlock`."""
        size = state.size if proportional else None
        return self.attn(self.norm1(x), size, state.policy, state.packing, importance, state.rope)

    def feed(self, x: Tensor) -> Tensor:
        """See `ReducingBlock`."""
        return self.mlp(self.norm2(x))

    def branch(self, number: int, x: Tensor, state: State) -> Tensor:
        """See `ReducingBlock`."""
        drop = self.drop_path1 if number == 1 else self.drop_path2
        return _drop_path(drop, self.scale(number, x), state.packing)


def _drop_path(drop: nn.Module, x: Tensor, packing: Packing | None) -> Tensor:
    """Drop whole images from a residual branch: by the first dimension, which of packed tokens is not the image's."""
    if packing is None or not drop.training or isinstance(drop, nn.Identity):
        return drop(x)
    return x * drop(x.new_ones(len(packing.lengths), 1))[image_of_row(packing)]


class PatchedTransformer(ReducingModel):
    """What a vision transformer does differently once its blocks reduce tokens."""

    # Of timm's.
    patch_embed: Any
    blocks: Any
    norm: Any
    num_prefix_tokens: int
    grad_checkpointing: bool
    attn_pool: Any
    global_pool: Any
    fc_norm: Any
    head_drop: Any
    head: Any

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images to the tokens that enter the first block, and their `State.rope`, if the model has one."""
        raise NotImplementedError

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """timm's; what pooling must know of the tokens goes there by hand, so that threads may share the model."""
        x, record = self._reduced(x, attn_mask, is_causal)
        self.tokred_record = record
        return self._head(x, record.state)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """timm's, with the blocks passing sizes on; afterwards `token_map` and `token_sizes` are those of this call."""
        x, record = self._reduced(x, attn_mask, is_causal)
        self.tokred_record = record
        return x

    def forward_mapped(self, x: Tensor) -> tuple[Tensor, TokenMap]:
        """`forward_features`, and the `token_map` of this very call, whatever other threads do with the model."""
        x, record = self._reduced(x)
        self.tokred_record = record
        return x, record.token_map()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """timm's, of what `forward_features` returned."""
        return self._head(x, self._state_of(x), pre_logits)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """timm's, with each token counting by its size, so that a mean is still one over the first tokens.

        Packed tokens (T, C) of the last forward give (B, C) as others do, or, with no pooling at all, stay as they are.

        Raises:
            ValueError: `x` is not what the last `forward_features` returned, and its sizes are needed. Tokens as many
                as entered the model (unmerged ones, say) count as one each.
        """
        return self._pool(x, self._state_of(x), pool_type)

    def _reduced(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> tuple[Tensor, Record]:
        """The final tokens, and what there is to know of them: `forward_features`, which leaves the model as it was."""
        refuse_proxy(x)
        if attn_mask is not None or is_causal:
            raise NotImplementedError(
                "tokred_kernels: a patched model takes no attn_mask and no is_causal, for its tokens change from block "
                "to block; call tokred_kernels.unpatch(model) first"
            )
        grid = self.patch_embed.dynamic_feat_size([whole(side) for side in x.shape[-2:]]) if has_grid(self) else None
        x, rope = self.embed(x)
        entered = (x.shape[0], x.shape[1], x.device)
        if grid is not None and grid[0] * grid[1] + self.num_prefix_tokens != x.shape[1]:
            grid = None  # after patch dropout
        state = State(grid=grid, patches=x.shape[1] - self.num_prefix_tokens, rope=rope)
        maps, counts = [], []
        for block in self.blocks:
            step: Any = block.tokred_step
            x, state, before = step.enter(self, x, state)
            attended = count(x, state)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, state, after = checkpoint(block, x, state, use_reentrant=False)
            else:
                x, state, after = block(x, state)
            counts.append((attended, count(x, state)))
            maps += [token_map for token_map in (before, after) if token_map is not None]
        kept = tuple(maps) if self.keeps_maps() else None
        x, record = self.norm(x), Record(kept, namedtuple_replace(state, rope=None), entered, tuple(counts))
        record.remember(x)
        return x, record

    def _head(self, x: Tensor, state: State | None, pre_logits: bool = False) -> Any:
        x = self.head_drop(self.fc_norm(self._pool(x, state)))
        return x if pre_logits else self.head(x)

    def _state_of(self, x: Tensor) -> State | None:
        """The state of tokens that somebody brings; None where they are others than the last forward gave."""
        record = self.tokred_record
        if record.gave(x):
            return record.state
        if x.dim() == 2:
            packing = record.state.packing
            gave = "no packed tokens" if packing is None else f"{packing.rows} of them"
            raise ValueError(
                f"tokred_kernels: packed tokens (T, C) must be those of the model's last forward, which gave {gave}, "
                f"got shape {tuple(x.shape)}; {AS_IT_IS}"
            )
        return None

    def _pool(self, x: Tensor, state: State | None, pool_type: str | None = None) -> Tensor:
        """`pool`, of tokens with this state; None for tokens of which nothing is known but that they are not packed."""
        kind = self.global_pool if pool_type is None else pool_type
        begin = first_pooled(self)
        weighs = self.attn_pool is not None or kind in ("avg", "avgmax")
        if state is None:
            if weighs:
                self._refuse_unknown(x)
            return super().pool(x, pool_type)  # type: ignore[misc]
        if state.policy is not None and (self.attn_pool is not None or kind not in MASKED_POOLS):
            raise ValueError(
                f"tokred_kernels: tokens that are masked cannot be pooled by {kind!r}, which would not pass over them; "
                f"supported are {', '.join(map(repr, MASKED_POOLS))}"
            )
        packing, size = state.packing, weights(state)
        if packing is not None and size is not None:
            if self.attn_pool is not None:
                images = zip(x.split(packing.lengths), size.split(packing.lengths), strict=True)
                pooled = [self._attend(one[None, begin:], own[None, begin:]) for one, own in images]
                return torch.cat(pooled) if pooled else x
            return pool_packed(x, size, packing, kind=kind, begin=begin) if kind else x
        if size is None or not weighs:
            return super().pool(x, pool_type)  # type: ignore[misc]
        if self.attn_pool is not None:
            return self._attend(x[:, begin:], size[:, begin:])
        return pool_sized(x, size, kind=kind, begin=begin)

    def _attend(self, x: Tensor, size: Tensor) -> Tensor:
        bias = size_bias(size, x) if self.counts_sizes() else None
        return self.attn_pool(x, attn_mask=bias)

    def _refuse_unknown(self, x: Tensor) -> None:
        """Raise where a mean over tokens must weigh them, and nobody knows by what."""
        record = self.tokred_record
        if record.entered is None or weights(record.state) is None:
            return
        if x.shape[1] != record.entered[1] or record.state.policy is not None:
            raise ValueError(
                "tokred_kernels: tokens that are pooled must be those of the model's last forward, for each counts by "
                f"its size, got others, of shape {tuple(x.shape)}; {AS_IT_IS}"
            )

    def forward_intermediates(self, *_: Any, **__: Any) -> Any:
        """Refuse: the intermediates of a patched model are no grids."""
        raise NotImplementedError(
            "tokred_kernels: forward_intermediates needs the same tokens after every block, and a patched model has "
            "fewer after each. For a dense grid use x = model.forward_features(images) and "
            "tokred_kernels.unmerge(x, model.token_map), or call tokred_kernels.unpatch(model) first"
        )


def head_width(attention: Any) -> int:
    """The channels of a head; timm's Eva names them from 1.0.23 on only."""
    return attention.proj.in_features // attention.num_heads


def has_grid(model: Any) -> bool:
    """Whether the patch embedding tells how many patches it makes of an image, down and across."""
    return hasattr(model.patch_embed, "dynamic_feat_size")


def first_pooled(model: Any) -> int:
    """The first token that pooling takes: timm's Eva pools by attention over the prefix too, and leaves it out else."""
    return 0 if getattr(model, "pool_include_prefix", model.attn_pool is not None) else model.num_prefix_tokens
