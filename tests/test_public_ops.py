# SPDX-License-Identifier: MIT
"""What the public ops have in common: defaults, result types and annotations."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokred_kernels as tk
from tokred_kernels.ops.registry import SPECS

ROOT = Path(__file__).parent.parent
X = torch.randn(2, 16, 4)


def test_num_prefix_is_0_by_default_in_every_op():
    parameters = {op: inspect.signature(getattr(tk, op)).parameters for op in set(SPECS) & set(tk.__all__)}
    defaults = {op: given["num_prefix"].default for op, given in parameters.items() if "num_prefix" in given}
    assert len(defaults) == 9 and set(defaults.values()) == {0}


def test_num_prefix_of_0_leaves_the_flags_in_force():
    flagged = tk.bipartite_match(X, 4, class_token=True)
    assert torch.equal(tk.bipartite_match(X, 4, class_token=True, num_prefix=0).dest, flagged.dest)
    with pytest.raises(ValueError, match="give num_prefix or class_token/distill_token, not both"):
        tk.bipartite_match(X, 4, class_token=True, num_prefix=1)


def test_importance_match_returns_a_named_tuple():
    found = tk.importance_match(X, 10)
    assert isinstance(found, tk.ImportanceMatch) and found.token_map.num_out == 10
    token_map, similarity = found
    assert token_map is found.token_map and similarity is found.similarity and similarity.shape == (2, 6)
    whole = tk.importance_match(X, 16)
    assert isinstance(whole, tk.ImportanceMatch) and whole.similarity.shape == (2, 0)


def test_window_match_needs_a_threshold_only_to_count_windows():
    assert torch.equal(tk.window_match(X, count=2).dest, tk.window_match(X, 0.5, count=2).dest)
    for count in ("batch", "image"):
        with pytest.raises(TypeError, match="threshold must be a number, got NoneType"):
            tk.window_match(X, count=count)
    with pytest.raises(ValueError, match="threshold must be a number, got NaN"):
        tk.window_match(X, float("nan"), count=2)


def test_max_is_another_name_of_amax():
    token_map = tk.bipartite_match(X, 4)
    x = X.clone().requires_grad_()
    by_name = {name: tk.merge(x, token_map, reduce=name) for name in ("max", "amax")}
    assert torch.equal(by_name["max"], by_name["amax"])
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in by_name.values()))
    with pytest.raises(ValueError, match="weight must be None with reduce="):
        tk.merge(X, token_map, reduce="max", weight=torch.ones(2, 16))


USER = """
import torch
import tokred_kernels as tk

x = torch.zeros(1, 4, 2)
token_map: tk.TokenMap = tk.bipartite_match(x, 1)
y: torch.Tensor = tk.merge(x, token_map)
out: torch.Tensor = tk.token_attention(x[None], x[None], x[None])
both: tuple[torch.Tensor, torch.Tensor] = tk.token_attention(x[None], x[None], x[None], importance="class")
similarity: torch.Tensor = tk.importance_match(x, 2).similarity
wrong: int = tk.unmerge(y, token_map)
"""


@pytest.mark.slow
def test_a_users_file_passes_mypy_strict(tmp_path):
    pytest.importorskip("mypy")
    assert (ROOT / "tokred_kernels/py.typed").exists()
    (tmp_path / "user.py").write_text(USER)
    flags = "--strict", "--config-file=", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")
    run = subprocess.run(
        [sys.executable, "-m", "mypy", *flags, "user.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Found 1 error in 1 file" in run.stdout, run.stdout + run.stderr
    assert 'user.py:11: error: Incompatible types in assignment (expression has type "Tensor"' in run.stdout
