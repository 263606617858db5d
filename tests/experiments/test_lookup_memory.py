# SPDX-License-Identifier: MIT
import json

import pytest

pytest.importorskip("matplotlib")


def test_memory_is_measured_and_drawn(load_experiment, tmp_path):
    out = tmp_path / "new" / "memory.png"
    load_experiment("lookup_memory").main(["--device", "cpu", "--tokens", "256", "512", "--out", str(out)])
    assert out.stat().st_size > 1000
    first, second = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert (first["tokens"], second["tokens"]) == (256, 512)
    for row in (first, second):
        assert row["results"] <= row["tokred"] < row["materialised"]
