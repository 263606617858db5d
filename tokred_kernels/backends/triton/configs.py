# SPDX-License-Identifier: MIT
"""Block sizes, warps and stages of the Triton kernels: pure functions of shape and dtype, and every config they give.

No config here has been tuned on a GPU. They are chosen so that a tile fits the registers of its warps and the 64 KiB of
shared memory of AMD's gfx942, which the tests read from the compiled kernels for each target. Those of attention, which
differ by architecture, are in configs_attention.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
    """Blocks of `block` sources or destinations of an image, against `chunk` sources at a time."""

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


# At most 64 channels at a time, and few scores and running maxima for each thread: with more, kernels spill registers
# if the metric's strides prevent wide loads. float32 products run on the vector units, where a thread holds whole rows
# of both operands: 16 channels.
_MATCH_16 = {channels: MatchConfig(64, 32, channels, 8, 2) for channels in (32, 64)}
_MATCH_32 = {16: MatchConfig(64, 64, 16, 8, 2)}
MATCH_CONFIGS = {dtype: _MATCH_32 if dtype == torch.float32 else _MATCH_16 for dtype in DTYPES}

# A limit in blocks of sources. Each block reads all destinations of an image, for each head. Above this limit (640
# tokens), another launch writes the mean over heads first.
MEAN_IN_MATCH_BLOCKS = 5

SELECT_LIMIT = 1024  # sources or destinations of an image whose map one program makes
SELECT_CONFIGS = {
    128: SelectConfig(128, 16, 4),
    512: SelectConfig(512, 8, 16),
    1024: SelectConfig(SELECT_LIMIT, 8, 16),
}
RANK_CONFIG = SelectConfig(128, 16, 4)  # ranks and members: many programs per image
SCAN_CONFIG = SelectConfig(1024, 8, 8)  # scans over one image, and passes over single tokens; `chunk` is not used

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


def match_config(channels: int, dtype: torch.dtype) -> MatchConfig:
    """Return the config for scores of vectors of `channels`."""
    configs = MATCH_CONFIGS[dtype]
    return configs[min((block for block in configs if block >= channels), default=max(configs))]


def select_config(num_src: int, num_dst: int) -> SelectConfig | None:
    """Return the config for the map of one image; None if the image is too large for one program."""
    larger = max(num_src, num_dst)
    return next((config for block, config in SELECT_CONFIGS.items() if block >= larger), None)


def rows_config(channels: int, dtype: torch.dtype) -> RowsConfig:
    """Return the config for copies of rows of `channels`: the widest block that pads a row by less than an eighth."""
    for block in (256, 128):
        if -channels % block < channels / 8:
            return ROWS_CONFIGS[block, dtype]
    return ROWS_CONFIGS[64, dtype]


def window_config(channels: int) -> WindowConfig:
    """Return the config for windows of tokens of `channels`."""
    return WINDOW_CONFIGS[min((block for block in WINDOW_CONFIGS if block >= channels), default=max(WINDOW_CONFIGS))]
