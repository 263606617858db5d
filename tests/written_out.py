# SPDX-License-Identifier: MIT
"""Load the plain implementations of the papers in tests/methods, and compare gradients with them."""

import importlib.util
from pathlib import Path


def load_dense(name):
    """The module tests/methods/dense_<name>.py."""
    path = Path(__file__).parent / "methods" / f"dense_{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def block_gradients(model, loss):
    """Return the gradients of the blocks' parameters, and reset them."""
    loss.backward()
    gradients = [p.grad.clone() for p in model.blocks.parameters()]
    model.zero_grad()
    return gradients
