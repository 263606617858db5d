# SPDX-License-Identifier: MIT
"""Triton kernels, for NVIDIA and AMD GPUs, and on CPU tensors by Triton's interpreter.

This file imports nothing, so that `availability` can be imported without Triton. Triton reads TRITON_INTERPRET when
kernels are defined: set TRITON_INTERPRET=1 before anything imports triton.
"""
