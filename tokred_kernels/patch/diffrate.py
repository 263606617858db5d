# SPDX-License-Identifier: MIT
"""DiffRate in ViTs: sort by class attention, prune, merge; counts given, or learned."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from tokred_kernels.checks import check_count
from tokred_kernels.files import check_fields, check_number, read_json
from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.nn.diffrate import CompressionRate
from tokred_kernels.ops.importance_match import importance_match
from tokred_kernels.ops.keep_topk import keep_topk
from tokred_kernels.ops.merge import merge
from tokred_kernels.partition import prefix_and_rest
from tokred_kernels.patch import models
from tokred_kernels.patch.models import ModelSpec, Parts
from tokred_kernels.patch.patched import Mark
from tokred_kernels.patch.positions import moved
from tokred_kernels.patch.state import State, Step, whole
from tokred_kernels.token_map import TokenMap

PRUNE, MERGE = "prune_kept_num", "merge_kept_num"  # the keys of the published compression_rate.json
FIGURES = ("gflops", "target_gflops")  # further keys of a saved `FoundRates`
MOST = 2**31 - 1  # the largest count
MODULES = ("prune_ddp", "merge_ddp")  # the published names of what is learned
# A token that joins one of opposite direction takes away from its size, and attention has no logarithm for 0 or less:
# then the key all but vanishes.
LEAST_SIZE = 1e-6
ALIKE = "have every block in one mode, by model.train() or model.eval()"


@dataclass(frozen=True)
class Compress(Step):
    """What a block does with given counts: of its tokens `prune` stay, and of these `merge` are left."""

    prune: int = 0
    merge: int = 0
    num_prefix: int = 0

    def importance(self, tokens: int) -> str | None:
        """See `Step`."""
        return None if self._is_idle(tokens) else "class"

    def reduce(
        self, block: Any, x: Tensor, keys: Tensor, importance: Tensor | None, state: State
    ) -> tuple[Tensor, State, TokenMap | None]:
        """See `Step`; sorting without removing anything would change nothing, and is left out."""
        tokens = whole(x.shape[1])
        if self._is_idle(tokens):
            return x, state, None
        stay, _ = self._stages(tokens)
        sort = keep_topk(importance, stay - self.num_prefix, num_prefix=self.num_prefix)  # type: ignore[arg-type]
        x, size = merge(x, sort, reduce="sum"), merge(_sizes(x, state), sort, reduce="sum")
        state = namedtuple_replace(state, size=size, grid=None, rope=moved(state.rope, sort))
        if self.merge >= stay:
            return x, state, sort
        join, similarity = importance_match(x, self.merge, num_prefix=self.num_prefix)
        scaled = _scale(size, similarity, self.merge)
        size = merge(scaled, join, reduce="sum").clamp_min(LEAST_SIZE)
        return (
            merge(x, join, reduce="mean"),
            namedtuple_replace(state, size=size, rope=moved(state.rope, join)),
            sort.then(join),
        )

    def _stages(self, tokens: int) -> tuple[int, int]:
        """How many of `tokens` tokens pruning leaves, and how many merging does."""
        stay = min(tokens, self.prune)
        return stay, min(stay, self.merge)

    def _is_idle(self, tokens: int) -> bool:
        return self._stages(tokens)[1] == tokens

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int | None:
        """See `Step`."""
        return self._stages(tokens)[1]

    def choice_flops(self, entering: int, attended: int, parts: Parts) -> int:
        """See `Step`: the product of the tokens that join and those that may be joined, of all channels."""
        stay, left = self._stages(attended)
        if left == stay:
            return 0
        partition = prefix_and_rest(stay, left, self.num_prefix)
        return 2 * partition.num_src * partition.num_dst * parts.width


@dataclass(frozen=True)
class CompressLearned(Step):
    """What a block does with the counts of its `prune_ddp` and `merge_ddp`: when training, tokens are masked."""

    num_prefix: int = 0

    def importance(self, tokens: int) -> str | None:
        """See `Step`."""
        return "class"

    def at(self, block: Any) -> Compress:
        """The step with the counts that `block` has learned so far."""
        prune, merged = torch.stack([block.prune_ddp.kept(), block.merge_ddp.kept()]).tolist()
        return Compress(self.proportional, int(prune), int(merged), self.num_prefix)

    def reduce(
        self, block: Any, x: Tensor, keys: Tensor, importance: Tensor | None, state: State
    ) -> tuple[Tensor, State, TokenMap | None]:
        """See `Step`."""
        if not block.training:
            if state.policy is not None:
                raise ValueError(f"tokred_kernels: a block in eval mode got masked tokens of one that trains; {ALIKE}")
            return self.at(block).reduce(block, x, keys, importance, state)
        return self._mask(block, x, importance, state)

    def _mask(self, block: Any, x: Tensor, importance: Any, state: State) -> tuple[Tensor, State, TokenMap | None]:
        """Sort; pass over what is pruned or joins another, and keep it behind (published code, training)."""
        batch, tokens, _ = x.shape
        known = block.prune_ddp.patch_number + self.num_prefix
        if tokens != known:
            raise ValueError(
                f"tokred_kernels: counts are learned on all {known} tokens of an image, got {tokens}; train on images "
                f"of the model's own size, without patch dropout, and {ALIKE}"
            )
        policy = x.new_ones(batch, tokens, dtype=importance.dtype) if state.policy is None else state.policy
        # Those that are masked stay behind the others, however little these are worth.
        worth = torch.where(policy.detach() > 0, importance.detach(), -torch.inf)
        sort = keep_topk(worth, tokens - self.num_prefix, num_prefix=self.num_prefix)
        x, size, policy = (
            merge(part, sort, reduce="sum") for part in (x, _sizes(x, state), policy.reshape(batch, tokens, 1))
        )
        policy, rope = policy[..., 0], moved(state.rope, sort)
        prune, merged = block.prune_ddp, block.merge_ddp
        last = known if batch == 0 else int(policy[0].detach().sum())
        stay, left = self.at(block)._stages(last)
        if stay < last:
            policy = policy * prune.mask(last)
        if left < stay:
            policy = policy * merged.mask(stay)
            join, similarity = importance_match(x[:, :stay], left, num_prefix=self.num_prefix)
            scaled = _scale(size[:, :stay], similarity, left).clamp_min(1)

            def joined(part: Tensor) -> Tensor:
                return torch.cat([merge(part[:, :stay], join, reduce="mean"), part[:, left:]], 1)

            x, rope = joined(x), None if rope is None else joined(rope)
            size = torch.cat([merge(scaled, join, reduce="sum"), scaled[:, left:], size[:, stay:]], 1)
        return x, namedtuple_replace(state, size=size, grid=None, policy=policy, rope=rope), sort

    def tokens_after(self, tokens: int, grid: tuple[int, int]) -> int | None:
        """See `Step`: that is for `at` to say; without a block at hand the last forward has it."""
        return None


def _sizes(x: Tensor, state: State) -> Tensor:
    """(B, N, 1) float32."""
    return x.new_ones(*x.shape[:2], 1, dtype=torch.float32) if state.size is None else state.size


def _scale(size: Tensor, similarity: Tensor, kept: int) -> Tensor:
    """The sizes, those of tokens from `kept` on by the cosine with which they join: who differs adds less."""
    return torch.cat([size[:, :kept], size[:, kept:] * similarity.unsqueeze(-1).to(size.dtype)], 1)


def apply(
    model: Any,
    *,
    kept: Any = None,
    granularity: int = 1,
    frozen: Any = (0,),
    prop_attn: bool = True,
    trace: bool = True,
) -> None:
    """Prune the least important tokens of each block, and merge some of the others into them: DiffRate (ICCV 2023).

    Between attention and MLP, by the attention that the class token pays: the tokens are sorted; only the first
    prune_kept_num stay; of these, those after the first merge_kept_num join the most similar one before. A merged token
    is the plain mean of its members, and a size that joins counts by its similarity, so that `model.token_sizes` are no
    whole numbers.

    Args:
        model: the ViT, with a class token.
        kept: how many tokens leave each stage: a JSON file, or a dict, with "prune_kept_num" and "merge_kept_num", one
            number for each block, prefix tokens included; what `diffrate_search` saves, or one entry of the published
            compression_rate.json, such as `json.load(file)["ViT-S-DeiT"]["2.9"]`. The text "None" instead of a list,
            as in that file, removes nothing in any block. A count above the number of tokens removes nothing either. A
            block whose merge_kept_num is not below its prune_kept_num only prunes, as in the published code, where 7
            of 31 entries have such blocks. None (default): the counts are learned, see below.
        granularity: with kept=None, the gap between the counts that may be learned.
        frozen: with kept=None, the blocks that always keep all tokens; counted from 0, or, if negative, from the end.
            (0,) (default) is the published setting for DeiT. State dicts published for MAE need (0, -1).
        prop_attn: True (default) lets keys count by their size.
        trace: True (default) keeps the maps of the last forward, for `model.token_map`.

    With kept=None each block gets two modules, `prune_ddp` and `merge_ddp` (`nn.CompressionRate`), whose parameters are
    the model's from then on, and which `unpatch` takes out. As published, frozen blocks have them too, with a single
    candidate, so that state dicts load. All others start in the middle: about half of the tokens stay. Evaluation uses
    the current counts, read from the device in every block; for speed, pass the counts found as `kept`. Training
    removes no token. Instead, attention masks those that would be removed (`token_attention`'s policy), so that a loss
    reaches the counts; `diffrate_search` is the loop for that, and `nn.compression_flops` the term that keeps them low.

    Raises as `patch` says, and OSError where the file cannot be read.
    """
    models.check_switches(prop_attn=prop_attn, trace=trace)
    anatomy = models.examine(model)
    check_count("patch", "granularity", granularity, least=1)
    unlearned = _frozen(frozen, len(anatomy.blocks))
    if not anatomy.class_token:
        raise NotImplementedError(
            'tokred_kernels.patch: "diffrate" sorts tokens by the attention of the class token, and this model has '
            'none; "tome" and "algm" need none'
        )
    settings = {"kept": kept, "granularity": granularity, "frozen": frozen, "prop_attn": prop_attn, "trace": trace}
    if kept is None:
        _install_learned(model, anatomy, granularity, unlearned, prop_attn, settings)
        return
    prefix = anatomy.num_prefix
    prune, merged = read_kept(kept, len(anatomy.blocks), prefix)
    models.install(
        model,
        Mark("diffrate", settings),
        lambda index: Compress(prop_attn, prune[index], merged[index], prefix),
    )


def _frozen(frozen: Any, depth: int) -> set[int]:
    """Return the blocks in `frozen`, counted from 0."""
    if not isinstance(frozen, (tuple, list)):
        raise TypeError(f"tokred_kernels.patch: frozen must be a tuple of ints, got {frozen!r}")
    for index in frozen:
        check_count("patch", "frozen", index, least=-depth)
        if index >= depth:
            raise ValueError(f"tokred_kernels.patch: frozen must be at most {depth - 1}, the last block, got {index}")
    return {index % depth for index in frozen}


def _install_learned(
    model: Any, anatomy: ModelSpec, granularity: int, frozen: set[int], prop_attn: bool, settings: dict[str, Any]
) -> None:
    if not anatomy.heeds_policy:
        raise NotImplementedError(
            "tokred_kernels.patch: counts are learned by masking tokens, which pooling by "
            f'{anatomy.pool} does not heed; make the model with "token" or "avg", or give kept='
        )
    prefix, patches = anatomy.num_prefix, anatomy.patches
    if patches is None:
        raise NotImplementedError(
            f"tokred_kernels.patch: counts are learned of a known number of patches, which {anatomy.gridless}, the "
            "model's patch embedding, does not tell; give kept="
        )
    for index, block in enumerate(anatomy.blocks):
        for name in MODULES:
            # As published, a frozen block has a single candidate: all tokens.
            rate = CompressionRate(patches, patches + 1 if index in frozen else granularity, num_prefix=prefix)
            setattr(block, name, rate.to(next(block.parameters()).device).train(block.training))
    models.install(
        model,
        Mark("diffrate", settings, MODULES),
        lambda index: Step(prop_attn) if index in frozen else CompressLearned(prop_attn, prefix),
    )


def read_kept(kept: Any, depth: int, prefix: int) -> tuple[list[int], list[int]]:
    """Return the two lists of counts in `kept`, a path or a dict, for `depth` blocks of `prefix` prefix tokens.

    Raises:
        TypeError: neither of them, or a count that is not an int.
        ValueError: not JSON, a missing or unknown key, or a count that is missing or out of range.
        OSError: the file cannot be read.
    """
    where = "tokred_kernels.patch: kept"
    if isinstance(kept, (str, os.PathLike)):
        where = f"{where}, the file {os.fspath(kept)},"
        kept = read_json(where, kept)
    if not isinstance(kept, Mapping):
        raise TypeError(
            f'{where} must be a path, a dict with "{PRUNE}" and "{MERGE}", or None, got {type(kept).__name__}'
        )
    if PRUNE not in kept or MERGE not in kept:
        raise ValueError(
            f'{where} must have "{PRUNE}" and "{MERGE}", got the keys '
            f"{', '.join(map(repr, kept)) or 'of nothing'}; of the published compression_rate.json, give one entry: "
            'json.load(file)["ViT-S-DeiT"]["2.9"]'
        )
    check_fields(where, dict(kept), (PRUNE, MERGE), FIGURES)
    for name in kept.keys() & FIGURES:
        check_number(f"{where} {name}", kept[name], float, 0, 1e9)
    prune, merged = (_counts(f"{where} {name}", kept[name], depth, prefix) for name in (PRUNE, MERGE))
    return prune, merged


def _counts(where: str, value: Any, depth: int, prefix: int) -> list[int]:
    if isinstance(value, str):  # as published: a list in quotes, or "None" for a model without that stage
        try:
            value = [MOST] * depth if value == "None" else json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{where} must be a list, got the text {reprlib.repr(value)}") from None
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{where} must be a list with one int a block, got {reprlib.repr(value)}")
    if len(value) != depth:
        raise ValueError(f"{where} must have one number for each of {depth} blocks, got {len(value)}")
    for index, number in enumerate(value):
        if isinstance(number, bool) or not isinstance(number, Integral):
            raise TypeError(f"{where}[{index}] must be an int, got {reprlib.repr(number)}")
        if not prefix < int(number) <= MOST:
            raise ValueError(
                f"{where}[{index}] must be at least {prefix + 1}, the prefix and one patch, and at most {MOST}, got "
                f"{reprlib.repr(number)}"
            )
    return [int(number) for number in value]
