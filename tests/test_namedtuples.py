# SPDX-License-Identifier: MIT
import pytest
import torch

from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.partition import every_other

PARTITION = every_other(17, 4, 1, False, False)


def test_only_what_is_named_changes():
    lists = torch.arange(3), torch.arange(4)
    for fields in ({"r": 2}, {"r": 2, "first": 5}, {}, {"sources": lists[0], "destinations": lists[1]}):
        got = namedtuple_replace(PARTITION, **fields)
        assert type(got) is type(PARTITION)
        assert got._asdict() == {**PARTITION._asdict(), **fields}
    assert PARTITION.r == 4


def test_a_field_that_there_is_not():
    with pytest.raises(ValueError, match="Partition has no field 's'"):
        namedtuple_replace(PARTITION, s=1)


def test_outlives_a_graph_break(fresh_dynamo):
    def shortened(x):
        partition = namedtuple_replace(PARTITION, r=x.shape[1])
        torch._dynamo.graph_break()
        return x + partition.r, partition

    x = torch.zeros(1, 3)
    out, partition = torch.compile(shortened, backend="eager")(x)
    assert torch.equal(out, x + 3)
    assert partition == PARTITION._replace(r=3)
