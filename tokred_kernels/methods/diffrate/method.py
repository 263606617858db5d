# SPDX-License-Identifier: MIT
"""DiffRate: sort tokens by class attention, prune the last, and merge others, with given or learned counts."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokred_kernels.checks import check_count
from tokred_kernels.methods.diffrate.counts import counts_of_blocks, read_kept
from tokred_kernels.methods.method import Method
from tokred_kernels.models.base import inspect_model, install
from tokred_kernels.models.patched import PatchInfo
from tokred_kernels.models.reducer import BlockReducer
from tokred_kernels.models.rope import merge_rope
from tokred_kernels.models.spec import BlockSpec, ModelSpec
from tokred_kernels.models.state import TokenState, int_size
from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.nn.diffrate import CompressionRate
from tokred_kernels.ops.importance_match import importance_match
from tokred_kernels.ops.keep_topk import keep_topk
from tokred_kernels.ops.merge import merge
from tokred_kernels.partition import prefix_and_rest
from tokred_kernels.token_map import TokenMap

MODULES = ("prune_ddp", "merge_ddp")  # the published names of the learned counts
# A token that merges with one of the opposite direction reduces its size, and attention takes the logarithm of sizes.
# With this size, the key almost vanishes.
LEAST_SIZE = 1e-6
SAME_MODE = "put all blocks into one mode, with model.train() or model.eval()"


@dataclass(frozen=True)
class DiffRate(Method):
    """DiffRate (Chen et al., ICCV 2023): in every block, prune the least important tokens and merge some others.

    Between attention and MLP, tokens are sorted by the attention of the class token (paper, section 3.2). Only the
    first `prune_kept_num` stay. Of these, the tokens after the first `merge_kept_num` merge into the most similar of
    the first ones. A merged token is the plain mean of its members. A member's size is weighted by its similarity, so
    `model.token_sizes` are not whole numbers. The model needs a class token.

    With `kept=None`, the counts are learned (section 3.3): every block gets two modules `prune_ddp` and `merge_ddp`
    (`nn.CompressionRate`), which are part of the model until `unpatch`. As published, frozen blocks have them too, with
    a single candidate, so that state dicts load. The others start in the middle: about half of the tokens stay.
    Evaluation uses the current counts and reads them from the device in every block; for speed, patch again with the
    counts as `kept`. Training removes no token: attention masks those that would be removed, so that a loss reaches the
    counts. `diffrate_search` trains the counts, and `methods.compression_flops` is the cost term of its loss.

    Args:
        kept: how many tokens stay after each stage: a JSON file or a dict with "prune_kept_num" and "merge_kept_num",
            each a list with one number per block, prefix tokens included. This is the format of `diffrate_search` and
            of an entry of the published compression_rate.json, for example `json.load(file)["ViT-S-DeiT"]["2.9"]`. The
            text "None" instead of a list, as in that file, removes nothing. A count above the number of tokens removes
            nothing either. A block whose `merge_kept_num` is not below its `prune_kept_num` only prunes, as in the
            published code, where 7 of 31 entries have such blocks. None (default) learns the counts.
        granularity: with `kept=None`, the gap between the counts that can be learned, at least 1. Default 1.
        frozen: with `kept=None`, the blocks that keep all tokens, counted from 0, or from the end if negative. Default
            (0,), as published for DeiT. State dicts published for MAE need (0, -1).
        prop_attn: True (default) weighs each key by its token's size.
        trace: True (default) keeps the maps of the last forward, for `model.token_map`.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: a number is out of range, or a file or dict has wrong content.
        OSError: the file cannot be read.
    """

    name: ClassVar[str] = "diffrate"

    kept: Mapping[str, Any] | str | os.PathLike[str] | None = None
    granularity: int = 1
    frozen: tuple[int, ...] = (0,)
    prop_attn: bool = True
    trace: bool = True

    def __post_init__(self) -> None:
        self.check_flags("prop_attn", "trace")
        granularity = check_count(self.owner, "granularity", self.granularity, least=1)
        if not isinstance(self.frozen, (tuple, list)):
            raise TypeError(f"tokred_kernels.{self.owner}: frozen must be a tuple of ints, got {self.frozen!r}")
        frozen = tuple(check_count(self.owner, "frozen", index, least=-(2**31)) for index in self.frozen)
        kept = None if self.kept is None else read_kept(self.owner, self.kept)
        self.store(kept=kept, granularity=granularity, frozen=frozen)

    def apply(self, module: nn.Module, reusable: Collection[str] = ()) -> None:
        """See `Method`; learned counts are used again if they have the same candidates."""
        spec = inspect_model(module)
        frozen = self._frozen_blocks(len(spec.blocks))
        if not spec.has_class_token:
            raise NotImplementedError(
                'tokred_kernels.patch: "diffrate" sorts tokens by the attention of the class token, and this model has '
                'none; "tome" and "algm" need none'
            )
        prefix = spec.num_prefix
        if self.kept is not None:
            prune, merged = counts_of_blocks(self.kept, len(spec.blocks), prefix)  # type: ignore[arg-type]
            reducers = [DiffRateReducer(self.prop_attn, *counts, prefix) for counts in zip(prune, merged, strict=True)]
            install(module, PatchInfo(self), reducers.__getitem__)
            return
        self._add_rates(spec, frozen, reusable)
        install(
            module,
            PatchInfo(self, MODULES),
            lambda index: (BlockReducer if index in frozen else LearnedReducer)(self.prop_attn),
        )

    def _frozen_blocks(self, depth: int) -> set[int]:
        for index in self.frozen:
            if not -depth <= index < depth:
                raise ValueError(
                    f"tokred_kernels.patch: frozen must be from {-depth} to {depth - 1}, the last block, got {index}"
                )
        return {index % depth for index in self.frozen}

    def _add_rates(self, spec: ModelSpec, frozen: set[int], reusable: Collection[str]) -> None:
        """Give each block its `CompressionRate` modules."""
        if not spec.pools_masked:
            raise NotImplementedError(
                f"tokred_kernels.patch: counts are learned by masking tokens, which pooling by {spec.pool} cannot "
                'ignore; make the model with "token" or "avg", or give kept='
            )
        if spec.num_patches is None:
            raise NotImplementedError(
                f"tokred_kernels.patch: learning counts needs a known number of patches, which {spec.gridless_embed}, "
                "the model's patch embedding, does not define; give kept="
            )
        for index, block in enumerate(spec.blocks):
            # As published, a frozen block has a single candidate: all tokens.
            granularity = spec.num_patches + 1 if index in frozen else self.granularity
            for name in MODULES:
                rate = CompressionRate(spec.num_patches, granularity, num_prefix=spec.num_prefix)
                old = getattr(block, name) if name in reusable else None
                if old is not None and torch.equal(old.kept_token_candidate.cpu(), rate.kept_token_candidate):
                    continue
                setattr(block, name, rate.to(next(block.parameters()).device).train(block.training))


@dataclass(frozen=True)
class DiffRateReducer(BlockReducer):
    """Prune to `prune` tokens, and merge these to `merge` tokens."""

    prune: int = 0
    merge: int = 0
    num_prefix: int = 0

    def needed_importance(self, tokens: int) -> str | None:
        """See `BlockReducer`."""
        return None if self._is_idle(tokens) else "class"

    def reduce(
        self, block: Any, x: Tensor, keys: Tensor, importance: Tensor | None, state: TokenState
    ) -> tuple[Tensor, TokenState, TokenMap | None]:
        """See `BlockReducer`; if no token is removed, tokens are not sorted either."""
        tokens = int_size(x.shape[1])
        if self._is_idle(tokens):
            return x, state, None
        stay, _ = self.stages(tokens)
        sort = keep_topk(importance, stay - self.num_prefix, num_prefix=self.num_prefix)  # type: ignore[arg-type]
        x, size = merge(x, sort, reduce="sum"), merge(_sizes(x, state), sort, reduce="sum")
        state = namedtuple_replace(state, size=size, grid=None, rope=merge_rope(state.rope, sort))
        if self.merge >= stay:
            return x, state, sort
        join, similarity = importance_match(x, self.merge, num_prefix=self.num_prefix)
        scaled = _scale_sizes(size, similarity, self.merge)
        size = merge(scaled, join, reduce="sum").clamp_min(LEAST_SIZE)
        state = namedtuple_replace(state, size=size, rope=merge_rope(state.rope, join))
        return merge(x, join, reduce="mean"), state, sort.then(join)

    def stages(self, tokens: int) -> tuple[int, int]:
        """Return how many of `tokens` tokens are left after pruning, and after merging."""
        stay = min(tokens, self.prune)
        return stay, min(stay, self.merge)

    def _is_idle(self, tokens: int) -> bool:
        return self.stages(tokens)[1] == tokens

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int | None:
        """See `BlockReducer`."""
        return self.stages(tokens)[1]

    def selection_flops(self, entering: int, attended: int, spec: BlockSpec) -> int:
        """See `BlockReducer`: the matrix product of merging tokens and their candidates in the embedding dimension."""
        stay, left = self.stages(attended)
        if left == stay:
            return 0
        partition = prefix_and_rest(stay, left, self.num_prefix)
        return 2 * partition.num_src * partition.num_dst * spec.embed_dim


@dataclass(frozen=True)
class LearnedReducer(BlockReducer):
    """Reduce to the counts of the block's `prune_ddp` and `merge_ddp`; in training, mask tokens instead."""

    def needed_importance(self, tokens: int) -> str | None:
        """See `BlockReducer`."""
        return "class"

    def resolve(self, block: Any) -> DiffRateReducer:
        """Return the reducer with the counts that `block` has learned so far."""
        prune, merged = torch.stack([block.prune_ddp.kept(), block.merge_ddp.kept()]).tolist()
        return DiffRateReducer(self.prop_attn, int(prune), int(merged), block.prune_ddp.prefix)

    def reduce(
        self, block: Any, x: Tensor, keys: Tensor, importance: Tensor | None, state: TokenState
    ) -> tuple[Tensor, TokenState, TokenMap | None]:
        """See `BlockReducer`."""
        if block.training:
            return self._mask(block, x, importance, state)
        if state.policy is not None:
            raise ValueError(
                f"tokred_kernels: a block in eval mode got masked tokens from a block in training mode; {SAME_MODE}"
            )
        return self.resolve(block).reduce(block, x, keys, importance, state)

    def _mask(
        self, block: Any, x: Tensor, importance: Any, state: TokenState
    ) -> tuple[Tensor, TokenState, TokenMap | None]:
        """Sort the tokens, and mask those that pruning or merging would remove, as the published code in training."""
        batch, tokens, _ = x.shape
        prune, merged = block.prune_ddp, block.merge_ddp
        prefix = prune.prefix
        expected = prune.patch_number + prefix
        if tokens != expected:
            raise ValueError(
                f"tokred_kernels: counts are learned on all {expected} tokens of an image, got {tokens}; train on "
                f"images of the model's own size, without patch dropout, and {SAME_MODE}"
            )
        policy = x.new_ones(batch, tokens, dtype=importance.dtype) if state.policy is None else state.policy
        # Masked tokens stay behind the others, whatever their importance.
        ranking = torch.where(policy.detach() > 0, importance.detach(), -torch.inf)
        sort = keep_topk(ranking, tokens - prefix, num_prefix=prefix)
        x, size, policy = (
            merge(part, sort, reduce="sum") for part in (x, _sizes(x, state), policy.reshape(batch, tokens, 1))
        )
        policy, rope = policy[..., 0], merge_rope(state.rope, sort)
        last = expected if batch == 0 else int(policy[0].detach().sum())
        stay, left = self.resolve(block).stages(last)
        if stay < last:
            policy = policy * prune.mask(last)
        if left < stay:
            policy = policy * merged.mask(stay)
            join, similarity = importance_match(x[:, :stay], left, num_prefix=prefix)
            scaled = _scale_sizes(size[:, :stay], similarity, left).clamp_min(1)

            def joined(part: Tensor) -> Tensor:
                return torch.cat([merge(part[:, :stay], join, reduce="mean"), part[:, left:]], 1)

            x, rope = joined(x), None if rope is None else joined(rope)
            size = torch.cat([merge(scaled, join, reduce="sum"), scaled[:, left:], size[:, stay:]], 1)
        return x, namedtuple_replace(state, size=size, grid=None, policy=policy, rope=rope), sort

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int | None:
        """See `BlockReducer`: only `resolve` knows the counts."""
        return None


def _sizes(x: Tensor, state: TokenState) -> Tensor:
    """Return the sizes (B, N, 1) float32."""
    return x.new_ones(*x.shape[:2], 1, dtype=torch.float32) if state.size is None else state.size


def _scale_sizes(size: Tensor, similarity: Tensor, kept: int) -> Tensor:
    """Multiply the sizes of the tokens after the first `kept` by the cosine with their destination."""
    return torch.cat([size[:, :kept], size[:, kept:] * similarity.unsqueeze(-1).to(size.dtype)], 1)
