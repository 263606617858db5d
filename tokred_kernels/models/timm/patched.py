# SPDX-License-Identifier: MIT
"""Base classes of the patched classes of timm's transformers.

Blocks return `(x, state, token_map)`, so the state of a forward lives only in its local variables. This makes patched
models safe to compile, checkpoint and export. Only a finished forward stores a trace in the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokred_kernels.models.imports import import_timm
from tokred_kernels.models.patched import Patched, ReducingBlock, ReducingModel, check_not_traced_by_fx, split_heads
from tokred_kernels.models.state import ForwardTrace, TokenState, count_tokens, int_size, pooling_weights
from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.nn.attention import attend, size_bias
from tokred_kernels.nn.pooling import image_of_row, pool_packed, pool_sized
from tokred_kernels.packing import Packing
from tokred_kernels.token_map import TokenMap

import_timm()

from timm.layers import apply_rot_embed_cat  # noqa: E402
from timm.models._manipulate import checkpoint  # noqa: E402

# Values of `global_pool` that can ignore masked tokens.
MASKED_POOLS = ("token", "avg", "")
UNCHANGED = "pass the unchanged output of forward_features before the model runs again, or call the whole model"


class PatchedSelfAttention(Patched):
    """Self-attention that also returns its keys and their importance."""

    # Attributes of timm's class.
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
    rotate_half = False  # EvaAttention and AttentionRope have an attribute of this name since timm 1.0.20

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values (..., H, d) of tokens (..., C); keys and values can have fewer heads."""
        if self.qkv is None:
            layers = (getattr(self, f"{name}_proj") for name in "qkv")
            return tuple(split_heads(layer(x), head_dim(self)) for layer in layers)
        return self.split(self.qkv(x))

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Split (..., 3 H d) into three tensors (..., H, d)."""
        return split_heads(qkv, qkv.shape[-1] // (3 * self.num_heads)).chunk(3, -2)

    def forward(
        self,
        x: Tensor,
        size: Tensor | None = None,
        policy: Tensor | None = None,
        packing: Packing | None = None,
        importance: str | None = None,
        rope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attend on x (B, N, C), or packed (T, C), with `TokenState.rope`; see `nn.attention.attend` for the rest.

        Returns:
            The output, in the shape of x; the keys (B, H, N, d), or (T, H, d), after rotation; and their importance if
            requested.
        """
        q, k, v = self.heads(x)
        if packing is None:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            rope = rope.unsqueeze(1)  # the dimension of heads: after the tokens if packed, else before them
            layout = {"half": True} if self.rotate_half else {}
            q, k = (apply_rot_embed_cat(part, rope, **layout).type_as(v) for part in (q, k))
        keys, heads = k, 1 if packing is None else -2
        if k.shape[heads] != self.num_heads:
            k, v = (part.repeat_interleave(self.num_heads // part.shape[heads], dim=heads) for part in (k, v))
        wanted: Any = {"size": size, "policy": policy, "packed": packing, "importance": importance}
        fused = self.fused_attn and not _is_hooked(self.attn_drop)
        wanted["dropout"] = self.attn_drop.p if fused and self.training else 0.0
        y, importance_of_keys = attend(q, k, v, **wanted, fused=fused, drop=self.attn_drop)
        if packing is None:
            y = y.transpose(1, 2)
        y = self.norm(y.flatten(-2))
        gate = getattr(self, "gate", None)  # older timm has none
        if gate is not None:
            y = y * gate(x).sigmoid()
        return self.proj_drop(self.proj(y)), keys, importance_of_keys


def _is_hooked(module: nn.Module) -> bool:
    """Return whether calling the module runs hooks."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class PatchedPreNormBlock(ReducingBlock):
    """Base of the patched classes of timm's blocks."""

    # Attributes of timm's class.
    attn: Any
    mlp: Any
    norm1: Any
    norm2: Any
    drop_path1: Any
    drop_path2: Any

    def scale(self, branch: int, x: Tensor) -> Tensor:
        """Apply the layer scale of the first or second residual branch."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: TokenState | None = None) -> tuple[Tensor, TokenState, TokenMap | None]:
        """See `ReducingBlock.reduced`.

        Raises:
            RuntimeError: the block was called without the state that its model passes to it.
        """
        if state is None:
            raise RuntimeError(
                "tokred_kernels: only the patched model itself can call its blocks, because it tracks the state of the "
                "tokens; call model.forward_features(images) instead of model.blocks(tokens), or call "
                "tokred_kernels.unpatch(model) first"
            )
        return self.reduced(x, state)

    def attend(self, x: Tensor, state: TokenState, prop_attn: bool, importance: str | None) -> tuple[Any, ...]:
        """See `ReducingBlock`."""
        size = state.size if prop_attn else None
        return self.attn(self.norm1(x), size, state.policy, state.packing, importance, state.rope)

    def feed(self, x: Tensor) -> Tensor:
        """See `ReducingBlock`."""
        return self.mlp(self.norm2(x))

    def branch(self, number: int, x: Tensor, state: TokenState) -> Tensor:
        """See `ReducingBlock`."""
        drop = self.drop_path1 if number == 1 else self.drop_path2
        return _drop_path(drop, self.scale(number, x), state.packing)


def _drop_path(drop: nn.Module, x: Tensor, packing: Packing | None) -> Tensor:
    """Apply stochastic depth per image, for packed tokens too, whose first dimension is not the image."""
    if packing is None or not drop.training or isinstance(drop, nn.Identity):
        return drop(x)
    return x * drop(x.new_ones(len(packing.lengths), 1))[image_of_row(packing)]


class PatchedTransformer(ReducingModel):
    """Base of the patched classes of timm's vision transformers."""

    # Attributes of timm's class.
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
        """Return the tokens that enter the first block, and their `TokenState.rope` if positions are rotary."""
        raise NotImplementedError

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        """See timm. The state is passed to pooling as an argument, so threads can share the model."""
        x, trace = self._reduced(x, attn_mask, is_causal)
        self.tokred_trace = trace
        return self._head(x, trace.state)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """See timm. Afterwards, `token_map` and `token_sizes` describe this call."""
        x, trace = self._reduced(x, attn_mask, is_causal)
        self.tokred_trace = trace
        return x

    def forward_mapped(self, x: Tensor) -> tuple[Tensor, TokenMap]:
        """Return the output of `forward_features` and the `token_map` of this call, even if threads share the model."""
        x, trace = self._reduced(x)
        self.tokred_trace = trace
        return x, trace.token_map()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """See timm; `x` is the output of `forward_features`."""
        return self._head(x, self._state_of(x), pre_logits)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """See timm. Each token is weighed by its size, so that a mean is one over the input tokens.

        Packed tokens (T, C) of the last forward are pooled to (B, C), and without pooling are returned unchanged. If
        `x` has as many tokens as entered the model, for example after unmerging, all sizes are 1.

        Raises:
            ValueError: pooling needs sizes, and `x` is not the output of the last `forward_features`.
        """
        return self._pool(x, self._state_of(x), pool_type)

    def _reduced(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, ForwardTrace]:
        """Return the final tokens and the trace of this forward, without changing the model."""
        check_not_traced_by_fx(x)
        if attn_mask is not None or is_causal:
            raise NotImplementedError(
                "tokred_kernels: a patched model does not support attn_mask and is_causal, because its tokens change "
                "from block to block; call tokred_kernels.unpatch(model) first"
            )
        grid = self.patch_embed.dynamic_feat_size([int_size(side) for side in x.shape[-2:]]) if has_grid(self) else None
        x, rope = self.embed(x)
        entered = (x.shape[0], x.shape[1], x.device)
        if grid is not None and grid[0] * grid[1] + self.num_prefix_tokens != x.shape[1]:
            grid = None  # after patch dropout
        state = TokenState(grid=grid, patches=x.shape[1] - self.num_prefix_tokens, rope=rope)
        maps, counts = [], []
        for block in self.blocks:
            reducer: Any = block.tokred_reducer
            x, state, before = reducer.before_block(self, x, state)
            attended = count_tokens(x, state)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, state, after = checkpoint(block, x, state, use_reentrant=False)
            else:
                x, state, after = block(x, state)
            counts.append((attended, count_tokens(x, state)))
            maps += [token_map for token_map in (before, after) if token_map is not None]
        kept = tuple(maps) if self.keeps_maps() else None
        x, trace = self.norm(x), ForwardTrace(kept, namedtuple_replace(state, rope=None), entered, tuple(counts))
        trace.set_output(x)
        return x, trace

    def _head(self, x: Tensor, state: TokenState | None, pre_logits: bool = False) -> Any:
        x = self.head_drop(self.fc_norm(self._pool(x, state)))
        return x if pre_logits else self.head(x)

    def _state_of(self, x: Tensor) -> TokenState | None:
        """Return the state of the last forward if `x` is its output, else None."""
        trace = self.tokred_trace
        if trace.is_output(x):
            return trace.state
        if x.dim() == 2:
            packing = trace.state.packing
            expected = "none that are packed" if packing is None else f"{packing.rows} tokens"
            raise ValueError(
                f"tokred_kernels: packed tokens (T, C) must be the output of the last forward, which was {expected}, "
                f"got shape {tuple(x.shape)}; {UNCHANGED}"
            )
        return None

    def _pool(self, x: Tensor, state: TokenState | None, pool_type: str | None = None) -> Tensor:
        """Pool tokens with this state; None if the state is unknown and the tokens are not packed."""
        kind = self.global_pool if pool_type is None else pool_type
        begin = first_pooled(self)
        weighs = self.attn_pool is not None or kind in ("avg", "avgmax")
        if state is None:
            if weighs:
                self._check_sizes_are_ones(x)
            return super().pool(x, pool_type)  # type: ignore[misc]
        if state.policy is not None and (self.attn_pool is not None or kind not in MASKED_POOLS):
            raise ValueError(
                f"tokred_kernels: pooling by {kind!r} cannot ignore masked tokens; supported are "
                f"{', '.join(map(repr, MASKED_POOLS))}"
            )
        packing, size = state.packing, pooling_weights(state)
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
        bias = size_bias(size, x) if self.weighs_keys() else None
        return self.attn_pool(x, attn_mask=bias)

    def _check_sizes_are_ones(self, x: Tensor) -> None:
        """Raise ValueError if a mean needs the sizes of tokens that the last forward did not return."""
        trace = self.tokred_trace
        if trace.entered is None or pooling_weights(trace.state) is None:
            return
        if x.shape[1] != trace.entered[1] or trace.state.policy is not None:
            raise ValueError(
                "tokred_kernels: pooling weighs tokens by their size, so they must be the output of the last forward, "
                f"got others, of shape {tuple(x.shape)}; {UNCHANGED}"
            )

    def forward_intermediates(self, *_: Any, **__: Any) -> Any:
        """Raise NotImplementedError: the intermediates of a patched model are not grids."""
        raise NotImplementedError(
            "tokred_kernels: forward_intermediates needs the same tokens after every block, and a patched model has "
            "fewer after each. For a dense grid use x = model.forward_features(images) and "
            "tokred_kernels.unmerge(x, model.token_map), or call tokred_kernels.unpatch(model) first"
        )


def head_dim(attention: Any) -> int:
    """Return the head dimension; timm's Eva has no attribute for it before 1.0.23."""
    return attention.proj.in_features // attention.num_heads


def has_grid(model: Any) -> bool:
    """Return whether the patch embedding defines a grid of patches."""
    return hasattr(model.patch_embed, "dynamic_feat_size")


def first_pooled(model: Any) -> int:
    """Return the first pooled token: Eva pools the prefix only with attention pooling."""
    return 0 if getattr(model, "pool_include_prefix", model.attn_pool is not None) else model.num_prefix_tokens
