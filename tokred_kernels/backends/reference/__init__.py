# SPDX-License-Identifier: MIT
"""Pure PyTorch: readable, differentiable by autograd, in the dtype given, and exportable to ONNX."""
