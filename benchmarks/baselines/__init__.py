# SPDX-License-Identifier: MIT
"""PyTorch baselines: the chains of torch ops that the papers' authors published, rewritten in our own words."""
