# SPDX-License-Identifier: MIT
"""Fused kernels for token reduction in vision transformers: token maps, the ops on them, and patches for models."""

from tokred_kernels import flops, methods, nn, viz
from tokred_kernels.backends import use_backend
from tokred_kernels.backends.configuration import show_config
from tokred_kernels.methods.algm import Thresholds, calibrate_thresholds
from tokred_kernels.methods.diffrate import FoundRates, diffrate_search
from tokred_kernels.methods.evit import set_keep_rate
from tokred_kernels.ops.adaptive_bipartite_match import adaptive_bipartite_match
from tokred_kernels.ops.bipartite_match import bipartite_match
from tokred_kernels.ops.bipartite_merge import MergeOutput, bipartite_merge
from tokred_kernels.ops.grid_bipartite_match import grid_bipartite_match
from tokred_kernels.ops.importance_match import ImportanceMatch, importance_match
from tokred_kernels.ops.keep_topk import keep_topk
from tokred_kernels.ops.kth_bipartite_match import kth_bipartite_match
from tokred_kernels.ops.lookup_gather import lookup_gather
from tokred_kernels.ops.lookup_scatter import lookup_scatter
from tokred_kernels.ops.merge import merge
from tokred_kernels.ops.merge_wavg import merge_wavg
from tokred_kernels.ops.random_bipartite_match import random_bipartite_match
from tokred_kernels.ops.token_attention import token_attention
from tokred_kernels.ops.unmerge import unmerge
from tokred_kernels.ops.window_match import window_match
from tokred_kernels.packing import Packing
from tokred_kernels.patching import patch, patched_method, unpatch
from tokred_kernels.token_map import TokenMap
from tokred_kernels.version import __version__

__all__ = [
    "FoundRates",
    "ImportanceMatch",
    "MergeOutput",
    "Packing",
    "Thresholds",
    "TokenMap",
    "__version__",
    "adaptive_bipartite_match",
    "bipartite_match",
    "bipartite_merge",
    "calibrate_thresholds",
    "diffrate_search",
    "flops",
    "grid_bipartite_match",
    "importance_match",
    "keep_topk",
    "kth_bipartite_match",
    "lookup_gather",
    "lookup_scatter",
    "merge",
    "merge_wavg",
    "methods",
    "nn",
    "patch",
    "patched_method",
    "random_bipartite_match",
    "set_keep_rate",
    "show_config",
    "token_attention",
    "unmerge",
    "unpatch",
    "use_backend",
    "viz",
    "window_match",
]
