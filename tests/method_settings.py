# SPDX-License-Identifier: MIT
"""Settings of each method for models of four blocks and 36 patches, with which each removes some."""

METHODS = {
    "tome": {"r": 5},
    "algm": {"layers": (0, 2), "threshold": 0.2},
    "dynamicvit": {"layers": (1, 2), "keep": (0.7, 0.5)},
    "evit": {"layers": (1, 2), "keep_rate": 0.7},
    "diffrate": {"kept": {"prune_kept_num": [30, 25, 20, 15], "merge_kept_num": [27, 22, 18, 12]}},
}
