# SPDX-License-Identifier: MIT
"""One op, one name, one file a layer: a newcomer finds an op's reference, kernel, test and benchmark by its name."""

import re
from pathlib import Path

import pytest

import tokred_kernels as tk
from tokred_kernels import backends

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tokred_kernels"
# Ops that call another op's kernel with other arguments, and that op.
BUILT_ON = {
    "adaptive_bipartite_match": ("rank_candidates", "count_above_threshold", "build_match_map"),
    "bipartite_merge": ("bipartite_match", "merge"),
    "grid_bipartite_match": ("bipartite_match",),
    "importance_match": ("rank_candidates", "build_match_map"),
    "kth_bipartite_match": ("bipartite_match",),
    "merge_wavg": ("merge",),
    "random_bipartite_match": ("bipartite_match",),
    "window_match": ("window_similarity", "window_map"),
}
NOT_OPS = {"__init__", "arguments", "library", "counts"}
NOT_KERNELS = {"dispatch", "pages"}
# Registered beside the op whose gradient it is; the reference's gradients are autograd's.
GRADIENTS = {
    "merge_backward",
    "token_attention_backward",
    "lookup_gather_backward",
    "lookup_scatter_backward",
}
# Two kernels of integers that share a file.
MAP_OPS = {"to_csr", "compose"}


def names(folder, suffix):
    return {path.stem for path in folder.glob(f"*{suffix}")}


def test_every_op_has_a_file_in_each_layer():
    kernels = set(backends.OPS)
    assert names(PACKAGE / "ops", ".py") - NOT_OPS == (kernels - GRADIENTS) | set(BUILT_ON)
    assert names(PACKAGE / "backends/reference", ".py") - {"__init__", "segments"} == kernels - GRADIENTS
    assert names(PACKAGE / "backends/native", ".py") - {"__init__"} == kernels
    assert kernels <= names(PACKAGE / "backends/triton", ".py")
    assert names(ROOT / "csrc/cpu", ".cpp") - NOT_KERNELS == (kernels - MAP_OPS) | {"maps"}
    assert names(ROOT / "csrc/cuda", ".cu") == (kernels - MAP_OPS - set(backends.NO_CUDA_OPS)) | {"maps"}
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests/conformance").glob("test_*.py")}
    assert tested - {"token_attention_packed", "emulated_paths"} == (kernels - GRADIENTS) | set(BUILT_ON)


def test_every_public_op_has_a_benchmark_case():
    cases = (ROOT / "benchmarks/cases.py").read_text()
    for op in {*backends.OPS, *BUILT_ON} & set(tk.__all__):
        assert re.search(rf'"{op}"', cases), f"benchmarks/cases.py has no case of {op}"


def test_calls_go_one_way():
    above = {"backends": ("ops", "nn", "patch"), "ops": ("nn", "patch"), "nn": ("patch",)}
    for layer, forbidden in above.items():
        for path in (PACKAGE / layer).rglob("*.py"):
            for target in forbidden:
                assert f"tokred_kernels.{target}" not in path.read_text(), f"{path} imports {target}"


def test_everything_public_is_documented():
    for name in tk.__all__:
        assert getattr(tk, name).__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_of_the_pages_lead_somewhere(page):
    text = (ROOT / page).read_text()
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in re.findall(r"^#+ .*", text, re.M)
    }
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("https://"):
            assert (ROOT / page).parent.joinpath(link).exists(), link
