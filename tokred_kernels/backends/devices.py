# SPDX-License-Identifier: MIT
"""Checks that the backends' `can_run` functions share: dtypes, head dimensions and the index of a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokred_kernels.ops.registry import OpSpec

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def limits(op: OpSpec, backend: str, dtype: torch.dtype, dtypes: Sequence[torch.dtype], head_dim: int) -> str | None:
    """Return None if `backend` runs `op` with this dtype and head dimension, or the reason why not."""
    if dtype not in dtypes and not op.is_integer:
        return f"{backend} kernels take {', '.join(str(d)[6:] for d in dtypes)}, got {str(dtype)[6:]}"
    most = op.max_head_dim.get(backend, head_dim)
    if head_dim > most:
        return f"its kernels take at most {most} channels a head, got {head_dim}"
    return None


def device_index(device: torch.device) -> int:
    """Return the index of a GPU; of the current one if `device` has none."""
    return torch.cuda.current_device() if device.index is None else device.index
