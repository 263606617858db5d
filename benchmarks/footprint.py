# SPDX-License-Identifier: MIT
"""What a call takes besides time: kernels launched, and the most memory it holds beyond its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

CPU_MEMORY = "torch allocator: outputs and temporaries made through torch, not what BLAS or C++ code mallocs itself"
GPU_MEMORY = "torch.cuda.max_memory_allocated beyond what was allocated before the call"


def launches(call: Callable[[], Any]) -> int | None:
    """Kernels, copies and fills that one call puts on the GPU; None on the CPU, and where they cannot be counted."""
    if not torch.cuda.is_available():
        return None
    call()
    torch.cuda.synchronize()
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
    except (
        RuntimeError
    ) as error:  # the call has just run: it is profiling that is not to be had, which times do not need
        print(f"  launches are not counted: {error}")
        return None
    # The regions that torch.compile names are shown on the GPU too, around the kernels they hold.
    on_gpu = (event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not event.is_user_annotation for event in on_gpu)


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most bytes that one call holds at a time, outputs included and inputs not; see CPU_MEMORY and GPU_MEMORY."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = call()
        torch.cuda.synchronize()
        del output
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        output = call()
        del output
    held = peak = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()  # negative where memory is given back
            peak = max(peak, held)
    return peak
