# SPDX-License-Identifier: MIT
"""DiffRate: prune and merge, with counts that are given or learned."""
