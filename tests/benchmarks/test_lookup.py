# SPDX-License-Identifier: MIT
"""The cases of lookup attention, and the picture of its memory."""

import dataclasses
import json

import pytest
import torch

from benchmarks import agreement, lookup, lookup_memory, traffic
from benchmarks.cases import Case
from benchmarks.providers import Provider, providers

TINY = Case("lookup_scatter", "tiny", (2, 9, 12), 3, "cpu", heads=3, metric_dim=4, training=True)


@pytest.mark.parametrize("op", ["lookup_gather", "lookup_scatter"])
@pytest.mark.parametrize("training", [False, True])
def test_every_provider_agrees(op, training):
    case = dataclasses.replace(TINY, op=op, training=training)
    inputs = lookup.draw(case, 0)
    names = set()
    for provider in providers(case, ["reference", "cpu"], False):
        agreement.check(case, provider, inputs)
        names.add(provider.name)
    assert names == {"published", "reference", "cpu"}


@pytest.mark.parametrize("output", range(6))
def test_a_wrong_result_is_told(output):
    right = lookup.with_backward(lookup.ours(TINY))

    def wrong(inputs):
        results = list(right(inputs))
        results[output] = results[output] + 1e-2 * results[output].abs().max()
        return tuple(results)

    with pytest.raises(agreement.Disagreement, match="off by"):
        agreement.check(TINY, Provider("cpu", wrong, "cpu"), lookup.draw(TINY, 0))


def test_bytes_and_operations_by_hand():
    few, many = 2 * 3 * 12 * 4, 2 * 9 * 12 * 4
    forward = dataclasses.replace(TINY, training=False)
    gather = dataclasses.replace(forward, op="lookup_gather")
    assert lookup.result_bytes(gather) == few
    assert lookup.result_bytes(forward) == few + many
    assert lookup.result_bytes(TINY) == few + many + 2 * few + 2 * many
    assert traffic.least_bytes(gather) == 2 * few + 2 * many + 4 * 2 * 3 * 3
    assert traffic.operations(gather) == 2 * 2 * 2 * 3 * 9 * 12
    assert traffic.operations(forward) == 2 * traffic.operations(gather)
    assert traffic.operations(TINY) == 7 * traffic.operations(gather)


def test_memory_is_drawn(tmp_path):
    out = tmp_path / "new" / "memory.png"
    lookup_memory.main(["--device", "cpu", "--tokens", "256", "512", "--out", str(out)])
    assert out.stat().st_size > 1000
    first, second = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert (first["tokens"], second["tokens"]) == (256, 512)
    for row in (first, second):
        assert row["results"] <= row["tokred"] < row["materialised"]


def test_the_memory_of_a_gpu_that_there_is_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        lookup_memory.main(["--device", "cuda", "--out", str(tmp_path / "memory.png")])
    assert "--device cuda: torch sees no CUDA device here" in capsys.readouterr().err
