# SPDX-License-Identifier: MIT
"""Runs of tests/conformance in processes that simulate a GPU: in Triton's interpreter, or in the CUDA emulator."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

HAS_TRITON = importlib.util.find_spec("triton") is not None
FOLDER = Path(__file__).parent / "conformance"
# Each family runs in one process: few processes to start, yet a failure is easy to find.
FAMILIES = {
    "match": ("bipartite_match", "rank_candidates"),
    "maps": ("build_match_map", "compose", "count_above_threshold", "keep_topk", "to_csr"),
    "rows": ("merge", "merge_wavg", "unmerge"),
    "windows": ("window_map", "window_similarity"),
    "attention": ("token_attention", "token_attention_packed"),
    "lookup": ("lookup_gather", "lookup_scatter"),
    "selectors": (  # Python around kernels of the other families
        *("adaptive_bipartite_match", "bipartite_merge", "grid_bipartite_match", "importance_match"),
        *("kth_bipartite_match", "random_bipartite_match", "window_match"),
    ),
}
# The families of Triton's interpreter: it takes minutes for the selectors.
INTERPRETED = {name: files for name, files in FAMILIES.items() if name != "selectors" and HAS_TRITON}


def run(names, environment, *options):
    """Run files of tests/conformance in a process with these variables; raise AssertionError with its output."""
    root = FOLDER.parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::RuntimeWarning", *options)
    # Capturing file descriptors would lose the report of a sanitizer that ends the process.
    files = [FOLDER / f"test_{name}.py" for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--capture=sys", *options, *files],
        env={**os.environ, **environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
