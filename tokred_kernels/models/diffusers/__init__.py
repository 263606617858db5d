# SPDX-License-Identifier: MIT
"""Adapter for diffusers."""
