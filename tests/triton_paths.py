# SPDX-License-Identifier: MIT
"""The paths of the Triton kernels that small shapes do not take: several blocks and splits, sorts, extra launches."""

from importlib import import_module

from tokred_kernels.backends.triton import configs_attention
from tokred_kernels.backends.triton.configs import SelectConfig, WindowConfig
from tokred_kernels.backends.triton.configs_tables import AttentionConfig

FEW_QUERIES, FEW_KEYS = AttentionConfig(16, 32, 128, 4, 1), AttentionConfig(32, 16, 128, 4, 1)
ATTRIBUTES = {
    "bipartite_match": {"select_config": lambda *_: None},  # maps from ranks, in launches of their own
    "build_match_map": {"SCAN_CONFIG": SelectConfig(32, 8, 1)},
    "count_above_threshold": {"SCAN_CONFIG": SelectConfig(32, 8, 1)},
    "keep_topk": {"SCAN_CONFIG": SelectConfig(32, 8, 1), "select_config": lambda *_: None},
    "lookup_gather": {"lookup_config": lambda *_: FEW_QUERIES},
    "lookup_gradients": {"lookup_config": lambda *_: FEW_KEYS},
    "lookup_scatter": {"lookup_config": lambda *_: FEW_KEYS},
    "rank_candidates": {"MEAN_IN_MATCH_BLOCKS": 0, "RANK_CONFIG": SelectConfig(32, 16, 1)},
    "to_csr": {"COUNTED_PAIRS": -1},
    "token_attention": {"attention_config": lambda *_: FEW_QUERIES, "importance_config": lambda *_: FEW_KEYS},
    "token_attention_backward": {
        "row_terms_config": lambda *_: FEW_QUERIES,
        "queries_config": lambda *_: FEW_KEYS,
        "keys_config": lambda *_: FEW_QUERIES,
    },
    "window_map": {"SCAN_CONFIG": SelectConfig(32, 8, 1)},
    "window_similarity": {"window_config": lambda _: WindowConfig(2, 16, 4, 1)},
}


def take_other_paths(monkeypatch):
    """Give the kernels other configurations than the shapes would."""
    monkeypatch.setattr(configs_attention, "LOOKUP_SPLIT_KEYS", 16)
    for module, attributes in ATTRIBUTES.items():
        for name, value in attributes.items():
            monkeypatch.setattr(import_module(f"tokred_kernels.backends.triton.{module}"), name, value)
