# SPDX-License-Identifier: MIT
"""Block sizes, warps and stages of the Triton kernels: pure functions of shape and dtype, and every config they give.

No config here has been tuned on a GPU. They are chosen so that a tile fits the registers of its warps and the 64 KiB of
shared memory of AMD's gfx942, which the tests read from the compiled kernels for each target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

Config = TypeVar("Config")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class MatchConfig:
    """A tile of scores, block_src x block_dst, over block_channels at a time."""

    block_src: int
    block_dst: int
    block_channels: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SelectConfig:
    """`block` sources or destinations of an image at once, against `chunk` sources at a time."""

    block: int
    chunk: int
    num_warps: int


@dataclass(frozen=True)
class WindowConfig:
    """Windows of a program, over block_channels at a time, and how many tokens of each are under way at once."""

    block_windows: int
    block_channels: int
    unroll: int
    num_warps: int


@dataclass(frozen=True)
class RowsConfig:
    """A tile of rows to move, and how many members of a slot are under way at once."""

    block_rows: int
    block_channels: int
    unroll: int
    num_warps: int


@dataclass(frozen=True)
class AttentionConfig:
    """A tile of scores, block_queries x block_keys, of heads of at most block_channels."""

    block_queries: int
    block_keys: int
    block_channels: int
    num_warps: int
    num_stages: int


# Longer vectors are taken 64 channels at a time, and a thread has few scores and their running best: with more of
# either, kernels spill where the metric's strides let no load be wide. float32 products run on the vector units, where
# a thread holds whole rows of both operands: 16 channels.
_MATCH_16 = {channels: MatchConfig(64, 32, channels, 8, 2) for channels in (32, 64)}
_MATCH_32 = {16: MatchConfig(64, 64, 16, 8, 2)}
MATCH_CONFIGS = {dtype: _MATCH_32 if dtype == torch.float32 else _MATCH_16 for dtype in DTYPES}

# In blocks of sources. An image's destinations are read once for each; with H heads that is H times as much, so that
# beyond so many blocks (640 tokens) the mean over heads is written first, in a launch of its own.
MEAN_IN_MATCH_BLOCKS = 5

SELECT_LIMIT = 1024  # sources or destinations of an image whose map one program makes
SELECT_CONFIGS = {
    128: SelectConfig(128, 16, 4),
    512: SelectConfig(512, 8, 16),
    1024: SelectConfig(SELECT_LIMIT, 8, 16),
}
RANK_CONFIG = SelectConfig(128, 16, 4)  # for ranks alone: as many programs as it takes

# A row that one warp holds is summed without a barrier, but 2048 channels would spill. Only longer rows are read twice.
WINDOW_CONFIGS = {
    **{channels: WindowConfig(512 // channels, channels, 4, 1) for channels in (128, 256, 512)},
    1024: WindowConfig(1, 1024, 4, 1),
    2048: WindowConfig(1, 2048, 4, 4),
}

# 16 bytes a thread, twice: 4 warps move 4 KiB.
_TILE_BYTES = 4096
ROWS_CONFIGS = {
    (channels, dtype): RowsConfig(_TILE_BYTES // dtype.itemsize // channels, channels, 4, 4)
    for channels in (64, 128, 256)
    for dtype in DTYPES
}

# Blocks by the widest head that they take. A program holds its heads whole; with a policy, which takes registers for
# what is added to a score's gradient and to its weight, it has fewer of them. float32 products run on the vector units:
# a thread holds rows of both operands. With more than these, kernels spill on one of the targets of the tests.
MAX_HEAD_WIDTH = 128
_ATTENTION_32 = {
    16: AttentionConfig(64, 32, 16, 8, 1),
    **{width: AttentionConfig(64, 16, width, 8, 1) for width in (32, 64)},
    128: AttentionConfig(32, 16, 128, 8, 1),
}
_ATTENTION_16 = {
    **{width: AttentionConfig(128, 64, width, 4, 3) for width in (16, 32)},
    64: AttentionConfig(128, 64, 64, 8, 3),
    128: AttentionConfig(128, 64, 128, 8, 2),
}
_POLICY_16 = {width: AttentionConfig(64, 64, width, 4, 2) for width in (16, 32, 64, 128)}
_QUERIES_32 = {**_ATTENTION_32, 128: AttentionConfig(16, 16, 128, 8, 1)}
_QUERIES_16 = {
    **{width: AttentionConfig(64, 64, width, 4, 2) for width in (16, 32)},
    **{width: AttentionConfig(64, 32, width, 4, 2) for width in (64, 128)},
}
_QUERIES_POLICY_16 = {width: AttentionConfig(64, 32, width, 4, 2) for width in (16, 32, 64, 128)}
_KEYS_32 = {
    **{width: AttentionConfig(16, 64, width, 8, 1) for width in (16, 32, 64)},
    128: AttentionConfig(16, 16, 128, 8, 1),
}
_KEYS_16 = {
    **{width: AttentionConfig(32, 64, width, 4, 2) for width in (16, 32, 64)},
    128: AttentionConfig(32, 64, 128, 8, 1),
}
_KEYS_POLICY_16 = {
    **{width: AttentionConfig(32, 64, width, 4, 1) for width in (16, 32, 64)},
    128: AttentionConfig(32, 32, 128, 4, 1),
}


def _by_dtype(
    single: dict[int, AttentionConfig], half: dict[int, AttentionConfig], half_policy: dict[int, AttentionConfig]
) -> dict[tuple[torch.dtype, bool], dict[int, AttentionConfig]]:
    """Keyed by dtype and whether there is a policy."""
    table = {(dtype, policy): half_policy if policy else half for dtype in DTYPES for policy in (False, True)}
    return table | {(torch.float32, policy): single for policy in (False, True)}


ATTENTION_CONFIGS = _by_dtype(_ATTENTION_32, _ATTENTION_16, _POLICY_16)
IMPORTANCE_CONFIGS = _by_dtype(_ATTENTION_32, _QUERIES_POLICY_16, _QUERIES_POLICY_16)
QUERIES_CONFIGS = _by_dtype(_QUERIES_32, _QUERIES_16, _QUERIES_POLICY_16)
KEYS_CONFIGS = _by_dtype(_KEYS_32, _KEYS_16, _KEYS_POLICY_16)


# Lookup attention has few queries, so that a program has but 32, and a split of the keys. With these many programs a
# GPU has enough to do; a split of fewer keys, or a sum of more splits, takes longer than it saves.
LOOKUP_PROGRAMS = 512
LOOKUP_SPLIT_KEYS = 128
LOOKUP_SPLITS = 64
_LOOKUP_32 = {
    **{width: AttentionConfig(32, 32, width, 4, 1) for width in (32, 64)},
    128: AttentionConfig(16, 32, 128, 8, 1),
}
_LOOKUP_GRADIENTS_32 = {
    32: AttentionConfig(32, 32, 32, 4, 1),
    64: AttentionConfig(32, 32, 64, 8, 1),
    128: AttentionConfig(16, 16, 128, 8, 1),
}
_LOOKUP_16 = {width: AttentionConfig(32, 64, width, 4, 2) for width in (32, 64, 128)}
_LOOKUP_KEYS_16 = {**_LOOKUP_16, 128: AttentionConfig(32, 32, 128, 4, 2)}
LOOKUP_CONFIGS = {
    (kernel, dtype): single if dtype == torch.float32 else half
    for kernels, single, half in (
        (("gather", "scatter"), _LOOKUP_32, _LOOKUP_16),
        (("queries",), _LOOKUP_GRADIENTS_32, _LOOKUP_16),
        (("keys",), _LOOKUP_GRADIENTS_32, _LOOKUP_KEYS_16),
    )
    for kernel in kernels
    for dtype in DTYPES
}
# Rows of what splits leave: 16 bytes a thread of each, and several splits at once.
COMBINE_CONFIGS = {width: RowsConfig(512 // width, width, 4, 4) for width in (32, 64, 128)}


def match_config(channels: int, dtype: torch.dtype) -> MatchConfig:
    """For scores of vectors of `channels`."""
    configs = MATCH_CONFIGS[dtype]
    return configs[min((block for block in configs if block >= channels), default=max(configs))]


def select_config(num_src: int, num_dst: int) -> SelectConfig | None:
    """For the map of one image; None where it is too large for one program."""
    larger = max(num_src, num_dst)
    return next((config for block, config in SELECT_CONFIGS.items() if block >= larger), None)


def rows_config(channels: int, dtype: torch.dtype) -> RowsConfig:
    """For moving rows of `channels`: the widest block that pads a row by less than an eighth."""
    for block in (256, 128):
        if -channels % block < channels / 8:
            return ROWS_CONFIGS[block, dtype]
    return ROWS_CONFIGS[64, dtype]


def window_config(channels: int) -> WindowConfig:
    """For windows of tokens of `channels`."""
    return WINDOW_CONFIGS[min((block for block in WINDOW_CONFIGS if block >= channels), default=max(WINDOW_CONFIGS))]


def attention_config(channels: int, dtype: torch.dtype, policy: bool) -> AttentionConfig:
    """For attention by heads of `channels`, at most MAX_HEAD_WIDTH."""
    return _narrowest(ATTENTION_CONFIGS[dtype, policy], channels)


def importance_config(channels: int, dtype: torch.dtype, policy: bool) -> AttentionConfig:
    """For the importance of keys."""
    return _narrowest(IMPORTANCE_CONFIGS[dtype, policy], channels)


def queries_config(channels: int, dtype: torch.dtype, policy: bool) -> AttentionConfig:
    """For the gradients of queries, and for what all gradients need of each row."""
    return _narrowest(QUERIES_CONFIGS[dtype, policy], channels)


def keys_config(channels: int, dtype: torch.dtype, policy: bool) -> AttentionConfig:
    """For the gradients of keys and values."""
    return _narrowest(KEYS_CONFIGS[dtype, policy], channels)


def lookup_config(kernel: str, channels: int, dtype: torch.dtype) -> AttentionConfig:
    """For lookup attention: "gather" or "scatter", or the gradients of "queries" or "keys"."""
    return _narrowest(LOOKUP_CONFIGS[kernel, dtype], channels)


def lookup_splits(programs: int, tokens: int, block: int) -> tuple[int, int]:
    """Into how many splits to part `tokens` for `programs` that would each take all, and how many a split has.

    Whole blocks, but in the last split, which has at least one token.
    """
    wanted = min(-(-LOOKUP_PROGRAMS // max(programs, 1)), LOOKUP_SPLITS, tokens // LOOKUP_SPLIT_KEYS)
    share = -(-tokens // max(wanted, 1) // block) * block
    return -(-tokens // share), share


def combine_config(channels: int) -> RowsConfig:
    """For adding up what splits leave."""
    return _narrowest(COMBINE_CONFIGS, channels)


def _narrowest(configs: dict[int, Config], channels: int) -> Config:
    return configs[min(block for block in configs if block >= channels)]
