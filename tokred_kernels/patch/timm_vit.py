# SPDX-License-Identifier: MIT
"""The adapter for timm's VisionTransformer: what all methods that reduce its tokens share.

A patched module keeps its object, parameters and hooks, and takes a class of ours that derives from its own. Blocks
pass on `(x, size, token_map)`, so that the state of one forward is in its local variables alone: safe to compile, to
checkpoint and to export. Only the finished forward leaves a record in the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokred_kernels.nn.attention import proportional_attention, size_bias
from tokred_kernels.patch import MARK
from tokred_kernels.patch.timm_import import import_timm
from tokred_kernels.token_map import TokenMap

import_timm()

from timm.layers import AttentionPoolLatent  # noqa: E402
from timm.models._manipulate import checkpoint  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import Attention, Block, VisionTransformer  # noqa: E402

# What a method may leave in a patched block: its own settings, by this name.
STEP = "tokred_step"
RECORD = "tokred_record"
SUPPORTED = "timm's VisionTransformer and VisionTransformerDistilled, made of timm's Block and Attention"
OWN_BLOCK = "write a block of your own with tokred_kernels.bipartite_match and merge_wavg"


class Mark(NamedTuple):
    """What was put into a model. A model that carries one is patched."""

    method: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        return ", ".join([f'"{self.method}"', *(f"{name}={value!r}" for name, value in self.settings.items())])

    def remove(self, model: nn.Module) -> None:
        """Give every module its own class back, and drop what we left in them."""
        for module in model.modules():
            if isinstance(module, Patched):
                for name in (STEP, RECORD, MARK):
                    module.__dict__.pop(name, None)
                module.__class__ = module.original  # type: ignore[assignment]


class Record:
    """What the last forward did: the map of each merge, the final sizes, and the (B, N) tokens that came in.

    A class, not a tuple, so that torch.export takes it for no tensor that a forward may not assign. It belongs to a
    forward, not to the model: copies and pickles of the model start without.
    """

    def __init__(
        self,
        maps: tuple[TokenMap, ...] | None = None,
        size: Tensor | None = None,
        entered: tuple[int, int, torch.device] | None = None,
    ) -> None:
        self.maps = maps
        self.size = size
        self.entered = entered

    def __reduce__(self) -> tuple[type[Record], tuple[()]]:
        return Record, ()


class Patched:
    """The mark of the classes that modules take while they are patched; `original` is the one they had."""

    original: type[nn.Module]


class PatchedAttention(Patched, Attention):
    """timm's Attention that takes token sizes and gives its keys too."""

    original = Attention

    def forward(  # type: ignore[override]
        self, x: Tensor, size: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend, x (B, N, C), with sizes (B, N, 1) where keys count by them; returns the keys (B, H, N, d), a view."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.attn_drop.p if self.training else 0.0
        y = proportional_attention(q, k, v, size, dropout=dropout, fused=self.fused_attn)
        y = self.norm(y.transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y)), k


class PatchedVisionTransformer(Patched, VisionTransformer):
    """What a VisionTransformer does differently once its blocks reduce tokens."""

    original: type[nn.Module] = VisionTransformer
    tokred_patch: Mark
    tokred_record: Record

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """timm's, with the blocks passing sizes on; afterwards `token_map` and `token_sizes` are those of this call."""
        if attn_mask is not None or is_causal:
            raise NotImplementedError(
                "tokred_kernels: a patched model takes no attn_mask and no is_causal, for its tokens change from block "
                "to block; call tokred_kernels.unpatch(model) first"
            )
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        entered = (x.shape[0], x.shape[1], x.device)
        size, maps = None, []
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, size, token_map = checkpoint(block, x, size)
            else:
                x, size, token_map = block(x, size)
            if token_map is not None:
                maps.append(token_map)
        kept = tuple(maps) if self.tokred_patch.settings.get("trace", True) else None
        self.tokred_record = Record(kept, size, entered)
        return self.norm(x)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """timm's, with each token counting by its size, so that a mean is still one over the first tokens."""
        size = self.tokred_record.size
        # Other tokens than the last forward gave (unmerged ones, say) count as one each.
        if size is None or size.shape[:2] != x.shape[:2]:
            return super().pool(x, pool_type)
        begin = 0 if self.pool_include_prefix else self.num_prefix_tokens
        kind = self.global_pool if pool_type is None else pool_type
        if self.attn_pool is not None:
            bias = size_bias(size[:, begin:], x) if self.tokred_patch.settings.get("prop_attn", True) else None
            return self.attn_pool(x[:, begin:], attn_mask=bias)
        if kind not in ("avg", "avgmax"):
            return super().pool(x, pool_type)
        weight = size[:, begin:] / size[:, begin:].sum(1, keepdim=True)
        mean = (x[:, begin:] * weight).sum(1).to(x.dtype)
        return mean if kind == "avg" else 0.5 * (x[:, begin:].amax(1) + mean)

    def forward_intermediates(self, *_: Any, **__: Any) -> Any:
        """Refuse: the intermediates of a patched model are no grids."""
        raise NotImplementedError(
            "tokred_kernels: forward_intermediates needs the same tokens after every block, and a patched model has "
            "fewer after each. For a dense grid use x = model.forward_features(images) and "
            "tokred_kernels.unmerge(x, model.token_map), or call tokred_kernels.unpatch(model) first"
        )

    @property
    def token_map(self) -> TokenMap:
        """From the tokens that entered the first block, prefix included, to the final ones, in the last forward.

        Composed when it is asked for, so a forward pays nothing for it. In a CUDA graph its tensors are the graph's,
        as outputs are: take them before the next replay.
        """
        record = self.tokred_record
        if record.entered is None:
            raise RuntimeError("tokred_kernels: token_map is of the last forward, and this model has run none yet")
        if record.maps is None:
            raise RuntimeError("tokred_kernels: the model was patched with trace=False; patch it with trace=True")
        if not record.maps:
            return TokenMap.identity(*record.entered)
        composed = record.maps[0]
        for token_map in record.maps[1:]:
            composed = composed.then(token_map)
        # One map from now on: asking twice composes once, and the layers' maps are let go.
        record.maps = (composed,)
        return composed

    @property
    def token_sizes(self) -> Tensor:
        """(B, N', 1) float32: how many of the tokens that entered each final token stands for, in the last forward."""
        record = self.tokred_record
        if record.entered is None:
            raise RuntimeError("tokred_kernels: token_sizes are of the last forward, and this model has run none yet")
        batch, tokens, device = record.entered
        return torch.ones(batch, tokens, 1, device=device) if record.size is None else record.size


class PatchedVisionTransformerDistilled(PatchedVisionTransformer, VisionTransformerDistilled):
    """A patched DeiT with a distillation token."""

    original: type[nn.Module] = VisionTransformerDistilled


PATCHED: dict[type[nn.Module], type[nn.Module]] = {
    kind.original: kind for kind in (PatchedVisionTransformer, PatchedVisionTransformerDistilled)
}


def check(model: Any) -> None:
    """Raise NotImplementedError unless `model` and all its parts are what this adapter was written for.

    Exact classes, not derived ones: what a subclass overrides, a patch would overrule in silence.
    """
    found = f"{type(model).__module__}.{type(model).__name__}"
    if type(model) not in PATCHED:
        wrapped = next((child for child in model.modules() if type(child) in PATCHED), None)
        advice = OWN_BLOCK if wrapped is None else "patch the VisionTransformer inside it, before anything wraps it"
        raise NotImplementedError(f"tokred_kernels.patch: {found} is not supported; {SUPPORTED} are. You can {advice}")
    for index, block in enumerate(model.blocks):
        parts = [("", block, Block)] + ([(".attn", block.attn, Attention)] if type(block) is Block else [])
        for name, part, wanted in parts:
            if type(part) is not wanted:
                raise NotImplementedError(
                    f"tokred_kernels.patch: blocks.{index}{name} of this {type(model).__name__} is a "
                    f"{type(part).__module__}.{type(part).__name__}, which is not supported; {SUPPORTED} are. "
                    f"You can {OWN_BLOCK}"
                )
    pool = model.attn_pool
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        raise NotImplementedError(
            f"tokred_kernels.patch: the model pools its tokens by {type(pool).__name__}, which needs all of them in "
            'place; supported are global_pool="token", "avg", "avgmax", "max", "", and "map" without a position '
            "embedding. You can make the model with another global_pool, or with num_classes=0 and global_pool=''"
        )


def install(model: Any, mark: Mark, block_class: type[nn.Module], steps: Callable[[int], Any]) -> None:
    """Patch `model`, which `check` has passed: blocks take `block_class`, and the method's settings `steps(index)`."""
    for index, block in enumerate(model.blocks):
        block.attn.__class__ = PatchedAttention
        block.__class__ = block_class
        setattr(block, STEP, steps(index))
    setattr(model, MARK, mark)
    setattr(model, RECORD, Record())
    model.__class__ = PATCHED[type(model)]
