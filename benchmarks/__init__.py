# SPDX-License-Identifier: MIT
"""Benchmarks: `run.py` times, `table.py` writes the README's table, `verify.py` records what a GPU has shown right."""
