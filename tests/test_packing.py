# SPDX-License-Identifier: MIT
"""What a packing made by hand must be: kernels follow its tensor without looking."""

import pytest
import torch

import tokred_kernels as tk

LENGTHS = (5, 0, 7)
STARTS = (0, 5, 5, 12)


def starts(values=STARTS, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def attend(packed):
    q = torch.randn(sum(LENGTHS), 2, 8, generator=torch.Generator().manual_seed(1))
    return tk.token_attention(q, q, q, packed=packed)


def match(packed):
    metric = torch.randn(sum(LENGTHS), 8, generator=torch.Generator().manual_seed(1))
    return tk.adaptive_bipartite_match(metric, threshold=-1.0, count="image", packed=packed).dest


OPS = pytest.mark.parametrize("op,name", [(attend, "token_attention"), (match, "adaptive_bipartite_match")])


@OPS
def test_a_strided_tensor_is_followed(op, name):
    wanted = op(tk.Packing.of(LENGTHS, torch.device("cpu")))
    strided = torch.full((2 * len(STARTS),), 1 << 20, dtype=torch.int32)[::2]
    strided[:] = starts()
    assert not strided.is_contiguous()
    assert torch.equal(op(tk.Packing(strided, LENGTHS)), wanted)


@OPS
@pytest.mark.parametrize(
    "tensor,lengths,error,words",
    [
        # What torch's cumsum makes of int32 lengths.
        (starts(dtype=torch.int64), LENGTHS, TypeError, "packed.cu_seqlens must be an int32 tensor, got torch.int64"),
        (STARTS, LENGTHS, TypeError, "packed.cu_seqlens must be an int32 tensor, got tuple"),
        (starts(), list(LENGTHS), TypeError, "packed.lengths must be a tuple of ints, got list"),
        (starts()[None], LENGTHS, ValueError, r"packed.cu_seqlens must be \(4,\).*got shape \(1, 4\)"),
        (starts()[:3], LENGTHS, ValueError, r"packed.cu_seqlens must be \(4,\).*got shape \(3,\)"),
        (starts((0, 5, 5, 40_000_000)), LENGTHS, ValueError, r"lengths = \(5, 0, 7\) .*got \[0, 5, 5, 40000000\]"),
        (starts((0, 5, 5, 9)), LENGTHS, ValueError, r"got \[0, 5, 5, 9\]"),
        (starts((1, 6, 6, 13)), LENGTHS, ValueError, r"got \[1, 6, 6, 13\]"),
        (starts((0, 14, 12)), (14, -2), ValueError, "packed.lengths must be at least 0, got -2"),
    ],
)
def test_bad_packings_name_what_is_wrong(op, name, tensor, lengths, error, words):
    with pytest.raises(error, match=rf"^tokred_kernels\.{name}: .*{words}"):
        op(tk.Packing(tensor, lengths))
