# SPDX-License-Identifier: MIT
"""Adapters for the model libraries, and what they share."""
