# SPDX-License-Identifier: MIT
"""The second view of a map, on the CPU and on CUDA."""

from __future__ import annotations

from torch import Tensor

from tokred_kernels.backends.native import check_indices, kernels, stream


def to_csr(dest: Tensor, num_out: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `token_map_ops.to_csr`."""
    dest = dest.contiguous()
    check_indices("to_csr", dest, dest)
    batch, tokens = dest.shape
    members = dest.new_empty(batch * tokens)
    begin = dest.new_empty(batch, num_out)
    count = dest.new_empty(batch, num_out)
    views = (members.data_ptr(), begin.data_ptr(), count.data_ptr())
    kernels(dest).to_csr(dest.data_ptr(), batch, tokens, num_out, *views, stream(dest))
    return members, begin, count
