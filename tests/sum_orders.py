# SPDX-License-Identifier: MIT
"""Another order of summation for Triton's interpreter.

The interpreter adds products in the order of numpy's BLAS, which is often the same in all kernels. A GPU uses another
order, which may differ between two kernels that multiply the same vectors.
"""

import sys
import zlib

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle


def shuffle_sums(monkeypatch):
    """Make `tl.dot` and `tl.sum` add terms one by one, in an order that differs from kernel to kernel."""

    def create_dot(self, a, b, total, input_precision, max_num_imprecise_acc):
        left, right = (t.data.astype(total.data.dtype) for t in (a, b))
        result = total.data.copy()
        for k in _order(left.shape[1]):
            result += left[:, k : k + 1] * right[k : k + 1]
        return TensorHandle(result, total.dtype.scalar)

    def add(self, values):
        data, axis = values.handle.data, self.axis
        shuffled = np.take(data, _order(data.shape[axis]), axis)
        result = np.take(np.add.accumulate(shuffled, axis, data.dtype), -1, axis)
        return self.to_tensor(np.expand_dims(result, axis) if self.keep_dims else result, values.dtype)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(ReduceOps, "sum", add)


def _order(length):
    """A permutation of `length` terms, seeded by the name of the kernel that is running."""
    frame = sys._getframe()
    while not frame.f_code.co_name.endswith("_kernel"):
        frame = frame.f_back
    return np.random.default_rng(zlib.crc32(f"{frame.f_code.co_name} {length}".encode())).permutation(length)
