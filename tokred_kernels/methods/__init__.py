# SPDX-License-Identifier: MIT
"""Token reduction methods: a frozen dataclass of settings for each, and functions on models patched with them."""

from tokred_kernels.methods.algm import ALGM
from tokred_kernels.methods.diffrate import DiffRate, compression_flops, kept_counts
from tokred_kernels.methods.dynamicvit import DynamicViT
from tokred_kernels.methods.evit import EViT
from tokred_kernels.methods.method import Method
from tokred_kernels.methods.tome import ToMe
from tokred_kernels.methods.tomesd import ToMeSD

__all__ = [
    "ALGM",
    "DiffRate",
    "DynamicViT",
    "EViT",
    "Method",
    "ToMe",
    "ToMeSD",
    "compression_flops",
    "kept_counts",
]
