# SPDX-License-Identifier: MIT
"""The block sizes of the Triton kernels: those for every shape, and those that were tuned."""

import itertools
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from support import DTYPES

from tokred_kernels import backends

pytest.importorskip("triton")


def test_every_op_has_a_triton_kernel_of_its_own():
    folder = Path(backends.__file__).parent / "triton"
    assert set(backends.OPS) <= {path.stem for path in folder.glob("*.py")}
    for path in folder.glob("*.py"):
        imported = re.findall(r"from tokred_kernels.backends.reference\S* import (.*)", path.read_text())
        assert ", ".join(imported).isupper() or not imported, f"{path} must import only constants from the reference"


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
    from tokred_kernels.backends.triton import configs_attention as configs
    from tokred_kernels.backends.triton.configs_tables import LOOKUP_KERNELS, TABLES

    of_attention = {
        "attention": configs.attention_config,
        "importance": partial(configs.importance_config, importance="last"),
        "importance_mean": partial(configs.importance_config, importance="mean"),
        "rows": configs.row_terms_config,
        "queries": configs.queries_config,
        "keys": configs.keys_config,
    }
    widths = [0, 1, 16, 17, 40, 64, 65, 128]
    for dtype, channels, architecture in itertools.product(DTYPES, widths, [*TABLES, "sm_89", "gfx942"]):
        table = TABLES.get(architecture, TABLES["portable"])
        for policy, (kernel, choose) in itertools.product((False, True), of_attention.items()):
            config = choose(channels, dtype, policy, architecture)
            assert config in table[kernel + "+policy" * policy, dtype].values()
            assert config.block_channels >= channels
        for kernel, compressed in itertools.product(LOOKUP_KERNELS, (1, 64, 65, 1024)):
            config = configs.lookup_config(kernel, compressed, channels, dtype, architecture)
            assert config in table[kernel + "+few" * (compressed <= 64), dtype].values()
            assert config.block_channels >= channels
        assert configs.combine_config(channels).block_channels >= channels


def test_tensors_of_the_cpu_get_what_is_portable():
    from tokred_kernels.backends.triton.configs_attention import architecture_of

    assert architecture_of(torch.zeros(1)) == "portable"


def test_splits_have_whole_blocks_and_all_tokens():
    from tokred_kernels.backends.triton import configs_attention as configs

    for programs, tokens, block in itertools.product([1, 3, 384, 512, 4096], [1, 33, 255, 256, 385, 65536], [32, 64]):
        for enough in (384, 512, 768):
            splits, share = configs.lookup_splits(programs, tokens, block, enough)
            assert share % block == 0
            assert (splits - 1) * share < tokens <= splits * share
            assert splits <= configs.LOOKUP_SPLITS
            assert splits == 1 or (programs < enough and tokens >= 2 * configs.LOOKUP_SPLIT_KEYS)
    assert configs.lookup_splits(1, 65536, 64) == (64, 1024)
    assert configs.lookup_splits(12, 1024, 64) == (8, 128)
    assert configs.lookup_splits(384, 1024, 64) == (2, 512)
    assert configs.lookup_splits(192, 4096, 64, 768) == (4, 1024)


ENTRY = {
    **{"architecture": "sm_90", "kernel": "keys+policy", "dtype": "bfloat16", "width": 64},
    **{"block_queries": 64, "block_keys": 128, "num_warps": 8, "num_stages": 2, "enough": 512},
}


def test_tuned_configs_go_before_the_tables(tmp_path):
    from tokred_kernels.backends.triton import configs_tuned
    from tokred_kernels.backends.triton.configs_tables import TABLES, AttentionConfig

    path, config = tmp_path / "tuned.json", AttentionConfig(64, 128, 64, 8, 2)
    tuned = {configs_tuned.Place(name, "keys+policy", "bfloat16", 64): config for name in ("sm_90", "sm_86")}
    configs_tuned.write(path, tuned)
    assert configs_tuned.read(path) == tuned
    tables = {name: {of: dict(by_width) for of, by_width in table.items()} for name, table in TABLES.items()}
    configs_tuned.apply(tuned, tables)
    assert tables["sm_90"]["keys+policy", torch.bfloat16][64] == config
    assert tables["sm_86"]["keys+policy", torch.bfloat16][64] == config
    del tables["sm_90"]["keys+policy", torch.bfloat16][64], tables["sm_86"]["keys+policy", torch.bfloat16][64]
    for name, table in tables.items():  # nothing else has changed
        for of, by_width in table.items():
            assert by_width.items() <= TABLES.get(name, TABLES["portable"])[of].items()


@pytest.mark.parametrize(
    "content,words",
    [
        ("{", "Expecting"),
        ("[]", "schema 1"),
        ({"schema": 2, "configs": []}, "schema 1"),
        ({"schema": 1}, "it must have schema, configs; missing: configs"),
        ({"schema": 1, "configs": {}}, '"configs" must be a list'),
        ({"schema": 1, "configs": [{"kernel": "keys"}]}, r"configs\[0\] must have architecture, block_keys"),
        ({"schema": 1, "configs": [ENTRY, ENTRY]}, r"configs\[1\] is for .*'keys\+policy'.* as one before it"),
        *(
            ({"schema": 1, "configs": [ENTRY | {name: value}]}, rf"configs\[0\]: {name} must be .*, got")
            for name, value in (
                *(("architecture", "hopper"), ("architecture", 90), ("kernel", "merge"), ("dtype", "float64")),
                *(("width", 48), ("block_queries", 48), ("num_warps", 3), ("num_warps", True), ("num_stages", 0)),
                *(("enough", 0), ("block_keys", "64"), ("block_keys", 64.0), ("block_keys", [64])),
            )
        ),
    ],
    ids=str,
)
def test_a_bad_file_of_tuned_configs_is_named(tmp_path, content, words):
    from tokred_kernels.backends.triton import configs_tuned

    path = tmp_path / "tuned.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=words) as error:
        configs_tuned.read(path)
    assert str(path) in str(error.value)
