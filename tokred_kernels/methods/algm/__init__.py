# SPDX-License-Identifier: MIT
"""ALGM: merge similar windows in an early block, and similar tokens in later ones."""
