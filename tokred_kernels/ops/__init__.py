# SPDX-License-Identifier: MIT
"""The ops, one file each: docstring, checks, autograd.Function, registration with torch.library.

The layers below are token_map, then backends, then plain data (packing, partition, windows). `registry`, the table of
all ops, is plain data too: it imports nothing of the package, and neither does this file, so any layer can read it.
"""
