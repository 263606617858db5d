# SPDX-License-Identifier: MIT
"""Adapter for timm."""
