# SPDX-License-Identifier: MIT
"""Block sizes, warps and stages of the Triton kernels: pure functions of shape and dtype, and every config they give.

No config here has been tuned on a GPU. They are chosen so that a tile fits the registers of its warps and the 64 KiB of
shared memory of AMD's gfx942, which the tests read from the compiled kernels for each target.
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
    """All sources and all destinations of an image at once, against `chunk` sources at a time."""

    block_src: int
    block_dst: int
    chunk: int
    num_warps: int


@dataclass(frozen=True)
class RowsConfig:
    """A tile of rows to move, and how many members of a slot are under way at once."""

    block_rows: int
    block_channels: int
    unroll: int
    num_warps: int


# float32 products run on the vector units, from registers: a smaller tile, and fewer channels at a time.
_MATCH_16 = {
    (sources, channels): MatchConfig(sources, 64, channels, sources // 16, 2)
    for sources in (64, 128)
    for channels in (16, 32, 64, 128)
}
_MATCH_32 = {(64, channels): MatchConfig(64, 64, channels, 8, 2) for channels in (16, 32)}
MATCH_CONFIGS = {dtype: _MATCH_32 if dtype == torch.float32 else _MATCH_16 for dtype in DTYPES}

# In blocks of sources. An image's destinations are read once for each; with H heads that is H times as much, so that
# beyond so many blocks it is less to read to write the mean over heads first, in a launch of its own.
MEAN_IN_MATCH_BLOCKS = 4

SELECT_LIMIT = 1024  # sources or destinations that one program ranks by counting; more are sorted
SELECT_CONFIGS = {
    (sources, destinations): SelectConfig(sources, destinations, 16, {128: 4, 512: 8, 1024: 16}[larger])
    for sources in (128, 512, 1024)
    for destinations in (128, 512, 1024)
    for larger in (max(sources, destinations),)
}

# 16 bytes a thread, twice: 4 warps move 4 KiB.
_TILE_BYTES = 4096
ROWS_CONFIGS = {
    (channels, dtype): RowsConfig(_TILE_BYTES // dtype.itemsize // channels, channels, 4, 4)
    for channels in (64, 128, 256)
    for dtype in DTYPES
}


def _power_of_two(value: int, low: int, high: int) -> int:
    return max(low, min(high, 1 << max(value - 1, 0).bit_length()))


def match_config(num_src: int, channels: int, dtype: torch.dtype) -> MatchConfig:
    """For scores of `num_src` sources by vectors of `channels`."""
    if dtype == torch.float32:
        return _MATCH_32[64, _power_of_two(channels, 16, 32)]
    return _MATCH_16[64 if num_src <= 128 else 128, _power_of_two(channels, 16, 128)]


def select_config(num_src: int, num_dst: int) -> SelectConfig | None:
    """For the map of one image; None where it is too large for one program."""
    if max(num_src, num_dst) > SELECT_LIMIT:
        return None

    def step(size: int) -> int:
        return 128 if size <= 128 else 512 if size <= 512 else 1024

    return SELECT_CONFIGS[step(num_src), step(num_dst)]


def rows_config(channels: int, dtype: torch.dtype) -> RowsConfig:
    """For moving rows of `channels`: the widest block that pads a row by less than an eighth."""
    for block in (256, 128):
        if -channels % block < channels / 8:
            return ROWS_CONFIGS[block, dtype]
    return ROWS_CONFIGS[64, dtype]
