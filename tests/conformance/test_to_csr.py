# SPDX-License-Identifier: MIT
import pytest
import torch
from support import slow
from tokred_kernels.token_map_ops import to_csr

from tokred_kernels import backends

OP = "to_csr"


def truth(dest, num_out):
    """members, begin and count, by their definition."""
    tokens = dest.shape[1]
    members, begin, count = [], [], []
    for image, row in enumerate(dest.tolist()):
        slots = [[image * tokens + n for n in range(tokens) if row[n] == slot] for slot in range(num_out)]
        count.append([len(slot) for slot in slots])
        begin.append([image * tokens + sum(count[-1][:slot]) for slot in range(num_out)])
        rows = [n for slot in slots for n in slot]
        members += rows + [-1] * (tokens - len(rows))
    return [members, begin, count]


def check(dest, num_out):
    results = to_csr(dest, num_out)
    assert [part.dtype for part in results] == [torch.int32] * 3
    assert [part.tolist() for part in results] == truth(dest, num_out)


# Sizes around a block and a chunk; many tokens in few slots, and more slots than tokens.
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 33, 129, *slow(128, 1024, 1025, 4100)])
@pytest.mark.parametrize("num_out", [1, 3, 128, *slow(257)])
def test_is_what_the_definition_says(device, tokens, num_out):
    dest = torch.randint(-1, num_out, (3, tokens), dtype=torch.int32)
    dest[1:2] = num_out - 1  # all in one slot, the others empty
    dest[2:3] = -1  # all dropped
    check(dest.to(device), num_out)
    check(dest[:1].to(device), num_out)


def test_strided_maps_and_maps_of_nothing(device):
    dest = torch.randint(-1, 9, (40, 2), dtype=torch.int32, device=device).t()
    check(dest, 9)
    check(torch.full((2, 40), -1, dtype=torch.int32, device=device), 0)
    for images, tokens, num_out in ((0, 5, 3), (2, 0, 0), (2, 0, 3)):
        check(torch.empty(images, tokens, dtype=torch.int32, device=device), num_out)


@pytest.mark.slow
def test_large_maps_equal_the_reference(device):
    dest = torch.randint(-1, 10_000, (1, 20_000), dtype=torch.int32, device=device)
    dest[0, 1000:3000] = 17
    expected = backends.implementation("reference", "to_csr")(dest, 10_000)
    for got, want in zip(to_csr(dest, 10_000), expected, strict=True):
        assert torch.equal(got, want.view(got.shape))
