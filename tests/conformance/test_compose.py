# SPDX-License-Identifier: MIT
import pytest
import torch
from support import slow
from tokred_kernels.token_map_ops import compose

OP = "compose"


@pytest.mark.parametrize("tokens,middle", [(0, 4), (1, 1), (3, 2), (100, 40), *slow((1025, 700))])
def test_is_what_the_definition_says(device, tokens, middle):
    first = torch.randint(-1, middle, (3, tokens), dtype=torch.int32)
    second = torch.randint(-1, 50, (3, middle), dtype=torch.int32)
    both = zip(first.tolist(), second.tolist(), strict=True)
    expected = [[to[slot] if slot >= 0 else -1 for slot in row] for row, to in both]
    first, second = first.to(device), second.to(device)
    assert compose(first, second).dtype == torch.int32
    assert compose(first, second).tolist() == expected
    assert compose(first[:0], second[:0]).shape == (0, tokens)


def test_a_map_that_drops_all_tokens(device):
    nothing = torch.full((2, 5), -1, dtype=torch.int32, device=device)
    assert (compose(nothing, nothing[:, :0]) == -1).all()
