# SPDX-License-Identifier: MIT
"""Native CUDA kernels run on the tensor's device, whichever is the current one."""

from types import SimpleNamespace

import pytest
import torch

import tokred_kernels as tk
from tokred_kernels import backends
from tokred_kernels.backends import native


class FakeTensor:
    is_cuda = True

    def __init__(self, device):
        self.device = device

    def get_device(self):
        return self.device


class FakeCuda:
    """Two devices, and one op that returns the current device."""

    def __init__(self):
        self.current = 0
        self.switches = 0

    def device(self, device):
        outer = self

        class Switch:
            def __enter__(self):
                self.before, outer.current = outer.current, device
                outer.switches += 1

            def __exit__(self, *_):
                outer.current = self.before

        return Switch()

    def op(self, *arguments):
        if arguments == ("fails",):
            raise RuntimeError("as asked")
        return self.current, arguments


@pytest.fixture
def fake(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(native, "CUDA", SimpleNamespace(op=cuda.op))
    monkeypatch.setattr(native, "_current_device", lambda: cuda.current)
    monkeypatch.setattr(native, "_raw_stream", lambda device: 100 + device)
    monkeypatch.setattr(torch.cuda, "device", cuda.device)
    return cuda


def test_the_tensors_device_is_current_while_an_op_runs(fake):
    assert native.kernels(FakeTensor(1)).op(3, 4) == (1, (3, 4))
    assert (fake.current, fake.switches) == (0, 1)
    with pytest.raises(RuntimeError, match="as asked"):
        native.kernels(FakeTensor(1)).op("fails")
    assert fake.current == 0
    with pytest.raises(AttributeError):
        _ = native.kernels(FakeTensor(1)).no_such_op


def test_nothing_is_switched_where_the_device_is_current(fake):
    assert native.kernels(FakeTensor(0)).op() == (0, ())
    fake.current = 1
    assert native.kernels(FakeTensor(1)).op() == (1, ())
    assert fake.switches == 0


def test_the_stream_is_that_of_the_tensors_device(fake):
    assert native.stream(FakeTensor(1)) == 101
    assert native.stream(torch.zeros(1)) == 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("tokens", [197, 1500])  # one launch with much shared memory, and three
def test_ops_on_another_device_than_the_current_one(tokens):
    # Coordinates of -1, 0, 1: cosines are exact, so the maps must be equal.
    metric = torch.randint(-1, 2, (2, tokens, 80), device="cuda:1").float()
    x = torch.randn(2, tokens, 32, device="cuda:1")
    with torch.cuda.device(0):
        with tk.use_backend("reference"):
            expected = tk.bipartite_merge(x, 40, metric=metric)
        with tk.use_backend("cuda"):
            got = tk.bipartite_merge(x, 40, metric=metric)
            compiled = torch.compile(tk.bipartite_merge)(x, 40, metric=metric)
        assert torch.cuda.current_device() == 0
        begin = backends.implementation("cuda", "to_csr")(got.token_map.dest, tokens - 40)[1]
    for result in (got, compiled):
        assert torch.equal(result.token_map.dest, expected.token_map.dest)
        torch.testing.assert_close(result.x, expected.x)
    assert begin.device == torch.device("cuda:1") and torch.equal(begin, got.token_map.views()[1].view_as(begin))


@pytest.mark.gpu
def test_the_stream_is_torchs_current_one():
    x = torch.zeros(1, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()) as _:
        assert native.stream(x) == torch.cuda.current_stream().cuda_stream != 0
