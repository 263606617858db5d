# SPDX-License-Identifier: MIT
"""The ops, one file each: docstring, checks, autograd.Function, registration with torch.library.

`registry` has the table of all ops. This file imports nothing, so that lower layers can import the table alone.
"""
