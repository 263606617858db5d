# SPDX-License-Identifier: MIT
"""The self-check of kernels on the machine at hand."""
