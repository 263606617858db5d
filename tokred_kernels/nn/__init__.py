# SPDX-License-Identifier: MIT
"""Modules and layer functions of the token-reduction systems, made of the package's ops."""

from tokred_kernels.nn.segmenter import LinearSegmenter

__all__ = ["LinearSegmenter"]
