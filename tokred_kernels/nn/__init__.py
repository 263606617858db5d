# SPDX-License-Identifier: MIT
"""Modules and layer functions of the token-reduction systems, made of the package's ops."""

from tokred_kernels.nn.diffrate import CompressionRate
from tokred_kernels.nn.dynamicvit import TokenPredictor, decide, distillation_loss, ratio_loss
from tokred_kernels.nn.evit import cosine_keep_rate, keep_attentive
from tokred_kernels.nn.lookupvit import (
    LookupLogits,
    LookupViT,
    lookup_loss,
    lookupvit_base,
    lookupvit_large,
    lookupvit_small,
    lookupvit_tiny,
)
from tokred_kernels.nn.lookupvit_block import LookupViTBlock
from tokred_kernels.nn.lookupvit_flops import lookupvit_flops
from tokred_kernels.nn.segmenter import LinearSegmenter

__all__ = [
    "CompressionRate",
    "LinearSegmenter",
    "LookupLogits",
    "LookupViT",
    "LookupViTBlock",
    "TokenPredictor",
    "cosine_keep_rate",
    "decide",
    "distillation_loss",
    "keep_attentive",
    "lookup_loss",
    "lookupvit_base",
    "lookupvit_flops",
    "lookupvit_large",
    "lookupvit_small",
    "lookupvit_tiny",
    "ratio_loss",
]
