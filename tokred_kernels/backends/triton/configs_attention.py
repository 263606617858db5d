# SPDX-License-Identifier: MIT
"""The block sizes of token and lookup attention: pure functions of architecture, shape and dtype.

The results of `benchmarks/tune.py`, in tuned.json in this folder, take precedence over the tables.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from tokred_kernels.backends.triton.configs import RowsConfig
from tokred_kernels.backends.triton.configs_tables import (
    ENOUGH_PROGRAMS,
    FEW_SUFFIX,
    POLICY_SUFFIX,
    PORTABLE,
    TABLES,
    AttentionConfig,
    ByWidth,
)
from tokred_kernels.backends.triton.configs_tuned import apply, read

FEW = 64  # lookup attention has other configs up to this number of compressed tokens

# Lookup attention has few queries and so few programs; the keys are split until there are enough programs. Splits of
# fewer keys, or more splits, take longer than they save.
LOOKUP_SPLIT_KEYS = 128
LOOKUP_SPLITS = 64

TUNED = Path(__file__).parent / "tuned.json"
if TUNED.exists():
    apply(read(TUNED), TABLES)

# Rows of partial results: each thread loads 16 bytes of each split, and several splits at once.
COMBINE_CONFIGS = {width: RowsConfig(512 // width, width, 4, 4) for width in (32, 64, 128)}


def architecture_of(tensor: Tensor) -> str:
    """Return the architecture whose configs apply to this tensor, such as "sm_90" or "gfx942"."""
    return gpu_architecture(tensor.device.index) if tensor.is_cuda else PORTABLE


@functools.cache
def gpu_architecture(index: int) -> str:
    """Return the architecture of a GPU by its index."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def attention_config(channels: int, dtype: torch.dtype, policy: bool, architecture: str = PORTABLE) -> AttentionConfig:
    """Return the config of attention with this head dimension."""
    return choose(_of("attention", policy), channels, dtype, architecture)


def importance_config(
    channels: int, dtype: torch.dtype, policy: bool, architecture: str = PORTABLE, importance: str = "mean"
) -> AttentionConfig:
    """Return the config for the importance of keys, by all queries ("mean") or one query."""
    name = "importance_mean" if importance == "mean" else "importance"
    return choose(_of(name, policy), channels, dtype, architecture)


def row_terms_config(channels: int, dtype: torch.dtype, policy: bool, architecture: str = PORTABLE) -> AttentionConfig:
    """Return the config for the terms of rows that all gradients need."""
    return choose(_of("rows", policy), channels, dtype, architecture)


def queries_config(channels: int, dtype: torch.dtype, policy: bool, architecture: str = PORTABLE) -> AttentionConfig:
    """Return the config for the gradients of queries."""
    return choose(_of("queries", policy), channels, dtype, architecture)


def keys_config(channels: int, dtype: torch.dtype, policy: bool, architecture: str = PORTABLE) -> AttentionConfig:
    """Return the config for the gradients of keys and values."""
    return choose(_of("keys", policy), channels, dtype, architecture)


def lookup_config(
    kernel: str, compressed: int, channels: int, dtype: torch.dtype, architecture: str = PORTABLE
) -> AttentionConfig:
    """Return the config for one of LOOKUP_KERNELS with `compressed` queries a head."""
    return choose(kernel + FEW_SUFFIX if compressed <= FEW else kernel, channels, dtype, architecture)


def choose(kernel: str, channels: int, dtype: torch.dtype, architecture: str) -> AttentionConfig:
    """Return the narrowest config of one of KERNELS that holds a head of `channels`."""
    table = TABLES.get(architecture) or TABLES[PORTABLE]
    return _narrowest(table[kernel, dtype], channels)


def lookup_splits(programs: int, tokens: int, block: int, enough: int = ENOUGH_PROGRAMS) -> tuple[int, int]:
    """Into how many splits to part `tokens` for `programs` that would each take all, and how many a split has.

    Whole blocks, but in the last split, which has at least one token. `enough` is how many programs there need be.
    """
    wanted = min(-(-enough // max(programs, 1)), LOOKUP_SPLITS, tokens // LOOKUP_SPLIT_KEYS)
    share = -(-tokens // max(wanted, 1) // block) * block
    return -(-tokens // share), share


def combine_config(channels: int) -> RowsConfig:
    """Return the config for the sum of splits."""
    return COMBINE_CONFIGS[min(width for width in COMBINE_CONFIGS if width >= channels)]


def _of(kernel: str, policy: bool) -> str:
    return kernel + POLICY_SUFFIX if policy else kernel


def _narrowest(by_width: ByWidth, channels: int) -> AttentionConfig:
    return by_width[min(width for width in by_width if width >= channels)]
