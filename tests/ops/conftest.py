# SPDX-License-Identifier: MIT
import pytest

import tokred_kernels as tk

GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")]


@pytest.fixture(params=["reference", "cpu", *GPU])
def everywhere(request):
    """Each backend in turn, the reference too, where the truth is known without it; yields their tensors' device."""
    with tk.use_backend(request.param):
        yield "cuda" if request.param in ("cuda", "triton") else "cpu"
