# SPDX-License-Identifier: MIT
"""Adapter for Hugging Face's transformers."""
