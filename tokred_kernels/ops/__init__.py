# SPDX-License-Identifier: MIT
"""The ops, one file each: docstring, checks, autograd.Function, registration with torch.library."""
