# SPDX-License-Identifier: MIT
"""One op, one name, one file a layer: a newcomer finds an op's reference, kernel, test and benchmark by its name."""

import re
from pathlib import Path

import pytest

import tokred_kernels as tk
from tokred_kernels.ops.registry import OPS, SPECS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tokred_kernels"
NOT_OPS = {"__init__", "autograd", "availability", "counts", "registry"}
NOT_KERNELS = {"dispatch", "pages"}
# Registered beside the op whose gradient it is; the reference's gradients are autograd's.
GRADIENTS = {name for name in OPS if name.endswith("_backward")}
# Two whole-number kernels that share a file, and are tested with the token map.
MAP_OPS = {"to_csr", "compose"}


def names(folder, suffix):
    return {path.stem for path in folder.glob(f"*{suffix}")}


def test_every_op_has_a_file_in_each_layer():
    kernels, with_cuda = set(OPS), {name for name in OPS if "cuda" in SPECS[name].backends}
    built = set(SPECS) - kernels
    assert names(PACKAGE / "ops", ".py") - NOT_OPS == (kernels - GRADIENTS - MAP_OPS) | built
    assert names(PACKAGE / "backends/reference", ".py") - NOT_OPS - {"segments"} == kernels - GRADIENTS
    assert names(PACKAGE / "backends/native", ".py") - NOT_OPS == kernels
    assert kernels <= names(PACKAGE / "backends/triton", ".py")
    assert names(ROOT / "csrc/cpu", ".cpp") - NOT_KERNELS == (kernels - MAP_OPS) | {"maps"}
    assert names(ROOT / "csrc/cuda", ".cu") == (with_cuda - MAP_OPS) | {"maps"}
    tested = {
        name.removeprefix("test_").removesuffix("_packed") for name in names(ROOT / "tests/ops", ".py") - {"conftest"}
    }
    assert tested == (kernels - GRADIENTS - MAP_OPS) | built


def test_every_public_op_has_a_benchmark_case():
    cases = (ROOT / "benchmarks/cases.py").read_text()
    for op in set(SPECS) & set(tk.__all__):
        assert re.search(rf'"{op}"', cases), f"benchmarks/cases.py has no case of {op}"


def test_calls_go_one_way():
    above = {
        **dict.fromkeys(("packing", "partition", "windows"), ("backends", "token_map", "ops", "nn", "patch")),
        "backends": ("token_map", "ops", "nn", "patch"),
        **dict.fromkeys(("token_map", "token_map_ops"), ("ops", "nn", "patch")),
        "ops": ("nn", "patch"),
        "nn": ("patch",),
    }
    for layer, forbidden in above.items():
        for path in [*(PACKAGE / layer).rglob("*.py"), *PACKAGE.glob(f"{layer}.py")]:
            for target in forbidden:
                text = path.read_text().replace("tokred_kernels.ops.registry", "")  # a table that imports nothing
                assert f"tokred_kernels.{target}" not in text, f"{path} imports {target}"


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
