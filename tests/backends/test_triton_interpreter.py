# SPDX-License-Identifier: MIT
"""The tests of the Triton kernels on a machine without a GPU: in Triton's interpreter."""

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import DTYPES

from tokred_kernels import backends

FILES = (
    "test_triton.py",
    "test_triton_best_match.py",
    "test_triton_keep_topk.py",
    "test_triton_lookup.py",
    "test_triton_token_attention.py",
    "test_triton_window_similarity.py",
)
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.slow
@pytest.mark.skipif(backends.triton_interprets(), reason="the tests of this process are interpreted already")
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file):
    folder = Path(__file__).parent
    root = folder.parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", folder / file],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_every_file_that_runs_kernels_is_run_here():
    files = Path(__file__).parent.glob("test_*.py")
    assert {path.name for path in files if re.search(r"def test_\w+\(device\b", path.read_text())} == set(FILES)


def test_every_shape_gets_a_config_that_is_compiled_in_the_tests():
    from tokred_kernels.backends.triton import configs

    for dtype, channels in itertools.product(DTYPES, [0, 1, 16, 17, 33, 64, 65, 192, 384, 768, 1024, 1280, 2049]):
        assert configs.match_config(channels, dtype) in configs.MATCH_CONFIGS[dtype].values()
        assert configs.rows_config(channels, dtype) in configs.ROWS_CONFIGS.values()
        config = configs.window_config(channels)
        assert config in configs.WINDOW_CONFIGS.values()
        assert config.block_channels >= min(channels, max(configs.WINDOW_CONFIGS))
    for num_src, num_dst in itertools.product([0, 1, 128, 129, 512, 513, 1024], repeat=2):
        assert configs.select_config(num_src, num_dst).block >= max(num_src, num_dst)
    assert configs.select_config(1025, 1) is None
    assert configs.select_config(1, 1025) is None


def test_every_head_gets_a_config_that_is_shipped():
    from tokred_kernels.backends.triton import configs

    of_attention = (
        (configs.attention_config, configs.ATTENTION_CONFIGS),
        (configs.importance_config, configs.IMPORTANCE_CONFIGS),
        (configs.queries_config, configs.QUERIES_CONFIGS),
        (configs.keys_config, configs.KEYS_CONFIGS),
    )
    for dtype, channels in itertools.product(DTYPES, [0, 1, 16, 17, 40, 64, 65, 128]):
        for policy, (choose, table) in itertools.product((False, True), of_attention):
            config = choose(channels, dtype, policy)
            assert config in table[dtype, policy].values()
            assert config.block_channels >= channels
        for kernel in ("gather", "scatter", "queries", "keys"):
            config = configs.lookup_config(kernel, channels, dtype)
            assert config in configs.LOOKUP_CONFIGS[kernel, dtype].values()
            assert config.block_channels >= channels
        assert configs.combine_config(channels).block_channels >= channels


def test_splits_have_whole_blocks_and_all_tokens():
    from tokred_kernels.backends.triton import configs

    for programs, tokens, block in itertools.product([1, 3, 384, 512, 4096], [1, 33, 255, 256, 385, 65536], [32, 64]):
        splits, share = configs.lookup_splits(programs, tokens, block)
        assert share % block == 0
        assert (splits - 1) * share < tokens <= splits * share
        assert splits <= configs.LOOKUP_SPLITS
        assert splits == 1 or (programs < configs.LOOKUP_PROGRAMS and tokens >= 2 * configs.LOOKUP_SPLIT_KEYS)
    assert configs.lookup_splits(1, 65536, 64) == (64, 1024)
    assert configs.lookup_splits(12, 1024, 64) == (8, 128)
    assert configs.lookup_splits(384, 1024, 64) == (2, 512)
