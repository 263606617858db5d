# SPDX-License-Identifier: MIT
"""What all benchmarks share: cases, providers, checks, clocks, memory, the machine, records and tables."""
