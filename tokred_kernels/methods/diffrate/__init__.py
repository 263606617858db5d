# SPDX-License-Identifier: MIT
"""DiffRate: its settings, reducers, costs and search."""

from tokred_kernels.methods.diffrate.cost import compression_flops, kept_counts
from tokred_kernels.methods.diffrate.method import DiffRate
from tokred_kernels.methods.diffrate.search import FoundRates, diffrate_search

__all__ = ["DiffRate", "FoundRates", "compression_flops", "diffrate_search", "kept_counts"]
