# SPDX-License-Identifier: MIT
"""Memory with guard bands and poison, to detect writes outside an output and reads of uninitialized memory.

While `Guarded` is active, tensors that Python code creates with `new_empty`, `empty_like` and similar functions lie
between guard bands, and are filled with a byte. The inputs lie between guard bands too, and must not change.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BAND = 1024  # bytes before and after; a multiple of every alignment that kernels ask for


class Guarded:
    """Replace torch's functions that create tensors, for the time of a `with` block.

    Args:
        device: where tensors are guarded.
        poison: the byte that fills new memory.
        band: the byte that fills the guard bands. Two runs with different bytes give different results if a kernel
            reads uninitialized memory, or outside a tensor.
    """

    _FUNCTIONS = ("empty", "empty_like", "zeros", "zeros_like")
    _METHODS = ("new_empty", "new_zeros")

    def __init__(self, device: torch.device, poison: int, band: int) -> None:
        self._device = device
        self._poison = poison
        self._band = band
        self._raw: list[tuple[Tensor, int]] = []
        self._inputs: list[tuple[Tensor, Tensor]] = []
        self._originals: dict[tuple[Any, str], Any] = {}

    def __enter__(self) -> Guarded:
        for owner, names in ((torch, self._FUNCTIONS), (torch.Tensor, self._METHODS)):
            for name in names:
                self._originals[owner, name] = getattr(owner, name)
                setattr(owner, name, self._replacement(getattr(owner, name), zero="zeros" in name))
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), original in self._originals.items():
            setattr(owner, name, original)

    def place(self, value: Any) -> Any:
        """Return `value` with the tensors in it copied to guarded memory, at the same offsets and strides."""
        if isinstance(value, Tensor):
            storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
            band = self._allocate((storage.numel(),), value.dtype)
            band.copy_(storage)
            self._inputs.append((band, band.clone()))
            return torch.as_strided(band, value.shape, value.stride(), band.storage_offset() + value.storage_offset())
        if isinstance(value, tuple):
            parts = [self.place(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    def fault(self) -> str | None:
        """Return what was written where nothing must be written, or None."""
        for raw, nbytes in self._raw:
            for name, band in (("before", raw[:BAND]), ("after", raw[BAND + nbytes :])):
                written = (band != self._band).nonzero()
                if len(written):
                    at = int(written[0 if name == "after" else -1])
                    distance = at if name == "after" else BAND - 1 - at
                    return f"wrote outside a tensor of {nbytes} bytes, {distance} bytes {name} it"
        for now, before in self._inputs:
            if not torch.equal(now.view(torch.uint8), before.view(torch.uint8)):
                return "wrote to an input"
        return None

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a contiguous tensor between guard bands; its contents are poison."""
        empty = self._originals.get((torch, "empty"), torch.empty)
        nbytes = math.prod(shape) * dtype.itemsize
        raw = empty(BAND + nbytes + BAND, dtype=torch.uint8, device=self._device)
        raw.fill_(self._band)
        self._raw.append((raw, nbytes))
        inside = raw[BAND : BAND + nbytes]
        inside.fill_(self._poison)
        return inside.view(dtype).view(shape)

    def _replacement(self, original: Any, zero: bool) -> Any:
        def create(*arguments: Any, **settings: Any) -> Tensor:
            # What the original would give, without its memory.
            like = original(*arguments, **(settings | {"device": "meta"}))
            first = arguments[0] if arguments else None
            device = torch.device(settings.get("device") or (first.device if isinstance(first, Tensor) else "cpu"))
            if device.type != self._device.type or not like.numel():
                return original(*arguments, **settings)
            order = sorted(range(like.dim()), key=lambda d: -like.stride(d))
            dense = self._allocate(tuple(like.shape[d] for d in order), like.dtype)
            inverse = sorted(range(like.dim()), key=order.__getitem__)
            result = dense.permute(inverse)
            if result.stride() != like.stride():  # dimensions of one element
                result = torch.as_strided(dense, like.shape, like.stride(), dense.storage_offset())
            return result.zero_() if zero else result

        return create
