# SPDX-License-Identifier: MIT
"""Count the scores that reach a threshold in Triton, one program per image.

One launch, or two if the threshold is the average over all images. A program reads the scores of its image up to three
times, from cache after the first, so both launches are bound by latency. Sums are float64, always in the same order.
"""

from __future__ import annotations

import ctypes
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokred_kernels.backends.triton.common import on_device
from tokred_kernels.backends.triton.configs import SCAN_CONFIG


def count_above_threshold(score: Tensor, threshold: float, divisor: float, own: bool) -> Tensor:
    """See `ops.count_above_threshold`."""
    score = score.contiguous()
    images, size = score.shape
    counts = score.new_empty(images, dtype=torch.int32)
    if images == 0:
        return counts
    options = {"BLOCK": SCAN_CONFIG.block, "num_warps": SCAN_CONFIG.num_warps}
    moments = None
    with on_device(score):
        if divisor and not own:
            moments = score.new_empty((2, images), dtype=torch.float64)
            moments_kernel[(images,)](score, moments, images, size, **options)
        # Triton passes floats as float32: the divisor is passed as the bits of a float64.
        bits = struct.unpack("<q", struct.pack("<d", divisor))[0]
        similar_kernel[(images,)](
            *(score, moments, counts, images, size, ctypes.c_float(threshold).value, bits),
            OWN=bool(divisor and own),
            AVERAGE=moments is not None,
            **options,
        )
    return counts


@triton.jit
def load_present(score, i, size):
    """Load scores i as float64, with a mask of those above -infinity."""
    value = tl.load(score + i, mask=i < size, other=float("-inf"))
    present = value > float("-inf")
    return tl.where(present, value, 0.0).to(tl.float64), present


@triton.jit
def image_moments(score, size, BLOCK: tl.constexpr):
    """Return the mean and unbiased standard deviation of the scores above -infinity; NaN for fewer than two."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    number = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        value, present = load_present(score, start + lanes, size)
        total += value
        number += present.to(tl.int32)
    number = tl.sum(number, 0).to(tl.float64)
    mean = tl.sum(total, 0) / number
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        value, present = load_present(score, start + lanes, size)
        deviation = tl.where(present, value - mean, 0.0)
        squares += deviation * deviation
    return mean, tl.sqrt(tl.sum(squares, 0) / (number - 1))


@triton.jit
def average(values, number, BLOCK: tl.constexpr):
    """Return the mean of float64 values."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, number, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(values + i, mask=i < number, other=0.0)
    return tl.sum(total, 0) / tl.cast(number, tl.float64)


@triton.jit(do_not_specialize=["images", "size"])
def moments_kernel(
    score,  # (B, size)
    moments,  # out: (2, B), float64
    images,
    size,
    BLOCK: tl.constexpr,
):
    """A program writes the mean and the standard deviation of one image."""
    image = tl.program_id(0).to(tl.int64)
    mean, std = image_moments(score + image * size, size, BLOCK)
    tl.store(moments + image, mean)
    tl.store(moments + images + image, std)


@triton.jit(do_not_specialize=["images", "size", "threshold", "divisor"])
def similar_kernel(
    score,  # (B, size)
    moments,  # (2, B), float64, if AVERAGE
    counts,  # out: (B)
    images,
    size,
    threshold,
    divisor,  # the bits of a float64
    OWN: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program counts the scores of one image; `threshold` is used unless OWN or AVERAGE."""
    image = tl.program_id(0).to(tl.int64)
    score += image * size
    least = tl.cast(threshold, tl.float64)
    if OWN:
        mean, std = image_moments(score, size, BLOCK)
        least = mean + std / tl.cast(divisor, tl.float64, bitcast=True)
    if AVERAGE:  # every program adds in the same order, so that all have the same threshold
        mean, std = average(moments, images, BLOCK), average(moments + images, images, BLOCK)
        least = mean + std / tl.cast(divisor, tl.float64, bitcast=True)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        value, present = load_present(score, start + tl.arange(0, BLOCK), size)
        count += (present & (value >= least)).to(tl.int32)
    tl.store(counts + image, tl.sum(count, 0))
