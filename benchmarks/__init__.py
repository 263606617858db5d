# SPDX-License-Identifier: MIT
"""Benchmarks: `run.py` times, `table.py` writes the README's table, `tune.py` searches for Triton block sizes."""
