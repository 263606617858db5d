# SPDX-License-Identifier: MIT
"""The layout of the package: one file per op and layer, and imports that go down the layers only."""

import ast
import re
from pathlib import Path

import pytest

import tokred_kernels as tk
from tokred_kernels.ops.registry import OPS, SPECS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tokred_kernels"
# From the top to the bottom; a module imports from its own layer and those below.
LAYERS = (
    ("__init__", "__main__"),
    ("patching",),
    ("methods",),
    ("flops",),
    ("models",),
    ("nn", "viz"),
    ("ops",),
    ("token_map", "token_map_ops"),
    ("backends",),
    ("packing", "partition", "windows"),
    ("checks", "dtypes", "files", "namedtuples", "torch_state", "version"),
)
# A table that imports nothing of the package: every layer can read it.
REGISTRY = "tokred_kernels.ops.registry"
DISPATCH = "tokred_kernels.backends.support"
NOT_OPS = {"__init__", "autograd", "availability", "counts", "registry"}
NOT_KERNELS = {"dispatch", "pages"}
# Registered in the file of the op; autograd computes the gradients of the reference.
GRADIENTS = {name for name in OPS if name.endswith("_backward")}
# Two kernels of integers that share a file.
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
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests/conformance").glob("test_*.py")}
    assert tested - {"token_attention_packed", "emulated_paths"} == (kernels - GRADIENTS) | built


def test_every_public_op_has_a_benchmark_case():
    cases = "".join(path.read_text() for path in (ROOT / "benchmarks/families").glob("*.py"))
    for op in set(SPECS) & set(tk.__all__):
        assert re.search(rf'"{op}"', cases), f"benchmarks/families must have a case of {op}"


def package_modules():
    """Map the name of every module of the package to its syntax tree."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def imports(name, tree, modules):
    """Yield the modules that a module imports, inside functions too, and by `import_module` with a (formatted) name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            full = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (one for one in (one if one in modules else node.module for one in full) if one in modules)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            parts = getattr(node.args[0], "values", [node.args[0]])  # those of an f-string, or one constant
            pattern = "".join(re.escape(part.value) if isinstance(part, ast.Constant) else "[^.]+" for part in parts)
            if pattern.startswith("tokred_kernels"):
                yield from (one for one in modules if re.fullmatch(pattern, one))


def import_graph():
    modules = package_modules()
    return {name: set(imports(name, tree, modules)) - {name} for name, tree in modules.items()}


def layer_of(module):
    if module == REGISTRY:
        return len(LAYERS)
    folder = module.split(".")[1] if "." in module else "__init__"
    return next(number for number, layer in enumerate(LAYERS) if folder in layer)


def test_imports_go_down_the_layers():
    upward = {
        (module, target)
        for module, targets in import_graph().items()
        for target in targets
        if layer_of(target) < layer_of(module)
    }
    assert not upward


def test_imports_have_no_circle():
    graph = import_graph()
    # This module loads a kernel, tokred_kernels.backends.<backend>.<op>, by its name when the op is called.
    graph[DISPATCH] = {target for target in graph[DISPATCH] if target.count(".") < 3}
    while graph:
        leaves = {module for module, targets in graph.items() if not targets & graph.keys()}
        assert leaves, f"these modules import one another: {sorted(graph)}"
        graph = {module: targets for module, targets in graph.items() if module not in leaves}


def test_the_import_graph_sees_every_kind_of_import():
    code = """
import tokred_kernels.a
def f():
    from tokred_kernels import b
    from tokred_kernels.c import name
    importlib.import_module(f"tokred_kernels.{kind}.x")
"""
    modules = {f"tokred_kernels.{name}" for name in ("a", "b", "c", "d", "e.x")}
    found = {name.removeprefix("tokred_kernels.") for name in imports("test", ast.parse(code), modules)}
    assert found == {"a", "b", "c", "e.x"}


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
    for link in links:
        if link.startswith("#"):
            assert link[1:] in headings, link
        elif not link.startswith("https://"):
            assert (ROOT / page).parent.joinpath(link).exists(), link
