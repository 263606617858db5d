# SPDX-License-Identifier: MIT
"""The blocks of token and lookup attention, by architecture: what configs_attention.py chooses from.

None has been measured on a GPU yet. The portable ones fit the 64 KiB of shared memory of AMD's gfx942; Hopper's are
chosen by what the compiler says of them (registers, instructions a score) and by what passes through L2. That none
spills on a target that it is used on, the tests read from the compiled kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokred_kernels.backends.triton.configs import DTYPES

PORTABLE = "portable"
ENOUGH_PROGRAMS = 512  # with these many a GPU has enough to do


@dataclass(frozen=True)
class AttentionConfig:
    """A tile of scores, block_queries x block_keys, of heads of at most block_channels.

    `enough` is how many programs to split the keys for, in kernels that do.
    """

    block_queries: int
    block_keys: int
    block_channels: int
    num_warps: int
    num_stages: int
    enough: int = ENOUGH_PROGRAMS


ByWidth = dict[int, AttentionConfig]
Table = dict[tuple[str, torch.dtype], ByWidth]

# The kernels of the tables, each also for what needs other blocks: a policy, which takes registers for what is added to
# a score's gradient and to its weight, or few queries. "importance" is of one query a head, no tile of products.
ATTENTION_KERNELS = ("attention", "importance", "importance_mean", "rows", "queries", "keys")
LOOKUP_KERNELS = ("gather", "scatter", "gather_queries", "gather_keys", "scatter_queries", "scatter_keys")
POLICY_SUFFIX, FEW_SUFFIX = "+policy", "+few"
KERNELS = tuple(
    name + suffix
    for names, suffixes in ((ATTENTION_KERNELS, ("", POLICY_SUFFIX)), (LOOKUP_KERNELS, ("", FEW_SUFFIX)))
    for name in names
    for suffix in suffixes
)


def _blocks(widths: tuple[int, ...], queries: int, keys: int, warps: int, stages: int, **more: int) -> ByWidth:
    return {width: AttentionConfig(queries, keys, width, warps, stages, **more) for width in widths}


# A program holds its heads whole. float32 products run on the vector units: a thread holds rows of both operands. With
# more than these, kernels spill on one of the targets of the tests.
_ATTENTION_32 = {
    **_blocks((16,), 64, 32, 8, 1),
    **_blocks((32, 64), 64, 16, 8, 1),
    **_blocks((128,), 32, 16, 8, 1),
}
_ATTENTION_16 = {
    **_blocks((16, 32), 128, 64, 4, 3),
    **_blocks((64,), 128, 64, 8, 3),
    **_blocks((128,), 128, 64, 8, 2),
}
_QUERIES_32 = {**_ATTENTION_32, **_blocks((128,), 16, 16, 8, 1)}
_QUERIES_16 = {**_blocks((16, 32), 64, 64, 4, 2), **_blocks((64, 128), 64, 32, 4, 2)}
_POLICY_16 = _blocks((16, 32, 64, 128), 64, 32, 4, 2)
_KEYS_32 = {**_blocks((16, 32, 64), 16, 64, 8, 1), **_blocks((128,), 16, 16, 8, 1)}
_KEYS_16 = {**_blocks((16, 32, 64), 32, 64, 4, 2), **_blocks((128,), 32, 64, 8, 1)}
_KEYS_POLICY_16 = {**_blocks((16, 32, 64), 32, 64, 4, 1), **_blocks((128,), 32, 32, 4, 1)}
_LOOKUP_32 = {**_blocks((32, 64), 32, 32, 4, 1), **_blocks((128,), 16, 32, 8, 1)}
_LOOKUP_GRADIENTS_32 = {
    **_blocks((32,), 32, 32, 4, 1),
    **_blocks((64,), 32, 32, 8, 1),
    **_blocks((128,), 16, 16, 8, 1),
}
_LOOKUP_16 = _blocks((32, 64, 128), 32, 64, 4, 2)
_LOOKUP_KEYS_16 = {**_LOOKUP_16, **_blocks((128,), 32, 32, 4, 2)}

# (kernels, with and without what suffixes say, float32, float16 and bfloat16)
_PORTABLE: tuple[tuple[tuple[str, ...], ByWidth, ByWidth], ...] = (
    (("attention",), _ATTENTION_32, _ATTENTION_16),
    (("attention+policy",), _ATTENTION_32, _POLICY_16),
    (("importance", "importance+policy"), _ATTENTION_32, _POLICY_16),
    (("importance_mean", "importance_mean+policy"), _ATTENTION_32, _POLICY_16),
    (("rows", "queries"), _QUERIES_32, _QUERIES_16),
    (("rows+policy", "queries+policy"), _QUERIES_32, _POLICY_16),
    (("keys",), _KEYS_32, _KEYS_16),
    (("keys+policy",), _KEYS_32, _KEYS_POLICY_16),
    (("gather", "gather+few", "scatter", "scatter+few"), _LOOKUP_32, _LOOKUP_16),
    (("gather_queries", "gather_queries+few"), _LOOKUP_GRADIENTS_32, _LOOKUP_16),
    (("scatter_queries", "scatter_queries+few"), _LOOKUP_GRADIENTS_32, _LOOKUP_16),
    (("gather_keys", "gather_keys+few"), _LOOKUP_GRADIENTS_32, _LOOKUP_KEYS_16),
    (("scatter_keys", "scatter_keys+few"), _LOOKUP_GRADIENTS_32, _LOOKUP_KEYS_16),
)

# Products run on Hopper's warpgroups where a tile has 64 rows for every four warps. More rows a program mean fewer
# readings of the other side, by L2 (128 queries: once for all of a lookup's); four warps of 128 rows mean fewer
# instructions a score than eight, since what is loaded for a column serves twice the rows; two programs a
# multiprocessor cover each other's waits. For float16 and bfloat16; the rest is as portable. They fit sm_100 as well.
_HOPPER_SCATTER = {**_blocks((32, 64), 64, 128, 4, 2), **_blocks((128,), 32, 128, 8, 2)}
_HOPPER_KEYS = {**_blocks((32, 64), 64, 64, 4, 2), **_blocks((128,), 32, 128, 8, 1)}
_HOPPER: dict[str, ByWidth] = {
    "attention": {**_blocks((32, 64), 128, 64, 4, 2), **_blocks((128,), 128, 64, 8, 3)},
    "importance": {**_blocks((32, 64), 64, 64, 4, 2), **_blocks((128,), 64, 32, 4, 2)},
    "importance_mean": _blocks((32, 64), 64, 64, 4, 2),
    "rows": {**_blocks((32, 64), 128, 32, 4, 2), **_blocks((128,), 128, 32, 8, 2)},
    "queries": {
        **_blocks((32,), 128, 32, 4, 2),
        **_blocks((64,), 128, 64, 4, 2),
        **_blocks((128,), 128, 64, 8, 2),
    },
    "keys": {**_blocks((32, 64), 64, 128, 8, 2), **_blocks((128,), 32, 128, 8, 1)},
    "gather": _blocks((32, 64, 128), 128, 64, 8, 3, enough=768),
    "gather+few": {**_blocks((32, 64), 64, 64, 4, 3, enough=768), **_blocks((128,), 64, 64, 4, 2, enough=768)},
    "scatter": _HOPPER_SCATTER,
    "scatter+few": _HOPPER_SCATTER,
    "gather_queries": {
        **_blocks((32, 64), 128, 32, 4, 3, enough=768),
        **_blocks((128,), 128, 64, 8, 2, enough=768),
    },
    "gather_queries+few": _blocks((32, 64, 128), 64, 64, 4, 2, enough=768),
    "scatter_queries": {
        **_blocks((32, 64), 128, 64, 8, 3, enough=384),
        **_blocks((128,), 128, 32, 8, 2, enough=384),
    },
    "scatter_queries+few": {
        **_blocks((32, 64), 64, 64, 4, 3, enough=384),
        **_blocks((128,), 64, 32, 4, 2, enough=384),
    },
    "gather_keys": _HOPPER_KEYS,
    "gather_keys+few": _HOPPER_KEYS,
    "scatter_keys": {**_HOPPER_KEYS, **_blocks((32, 64), 128, 64, 4, 2)},
    "scatter_keys+few": _HOPPER_KEYS,
}


def _portable() -> Table:
    return {
        (name, dtype): dict(single if dtype == torch.float32 else half)
        for names, single, half in _PORTABLE
        for name in names
        for dtype in DTYPES
    }


def _over_portable(halves: dict[str, ByWidth]) -> Table:
    return {
        (name, dtype): by_width if dtype == torch.float32 else by_width | halves.get(name, {})
        for (name, dtype), by_width in _portable().items()
    }


# By architecture; all others are portable.
TABLES: dict[str, Table] = {
    PORTABLE: _portable(),
    **{architecture: _over_portable(_HOPPER) for architecture in ("sm_90", "sm_100")},
}
