# SPDX-License-Identifier: MIT
"""The token map: where each token goes. Selectors return token maps; merge and unmerge take them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tokred_kernels.checks import MAX_ROWS, check_count, check_device, has_too_many, shape, shown
from tokred_kernels.packing import Packing
from tokred_kernels.token_map_ops import compose, to_csr
from tokred_kernels.torch_state import can_bypass_dispatcher


class TokenMap:
    """The destination of each of N tokens, for every image of a batch: one of `num_out` slots, or none.

    A slot is an output token. Shapes: B images, N tokens, N' = `num_out` slots. All tensors are int32, on one device.

    Attributes:
        dest: (B, N), the slot of each token, -1 for a dropped token.
        num_out: N', the same for every image.
        members: (B * N,), the absolute rows b * N + n of the kept tokens, grouped by slot and ascending in each slot.
            Image b has members[b * N : (b + 1) * N], whose unused tail holds -1.
        begin: (B, N'), the start of each slot's members in `members`.
        count: (B, N'), the number of members of each slot; it can be 0.

    `members`, `begin` and `count` are equivalent to `dest`. Selectors write both; a map made from `dest` alone computes
    the others at first use.

    In a **packed** map, each image has its own number of slots. The output is (T', C): T' = `num_out` is the sum
    over the images, and `packed.cu_seqlens` (B + 1,) holds the first row of each image. `dest` then holds rows of the
    output, and `begin` and `count` are (T',). The input is (B, N, C), or, after an earlier packed map, (T, C) with
    `packed_in`; then `dest` is (T,). Merge and unmerge take packed maps like any other.

    The constructor checks types, shapes and devices, and on the CPU all entries; on a GPU it reads nothing back. Do not
    change the tensors in place: the CPU kernels raise RuntimeError for an index that is out of range, but other changes
    are not detected.

    Raises:
        TypeError: a tensor is missing or not int32, or `num_out` is not an int.
        ValueError: shapes or devices do not fit together, an entry of `dest` is outside -1 to num_out - 1, or
            `members`, `begin` and `count` do not match `dest`.
    """

    dest: Tensor
    num_out: int
    packed: Packing | None
    packed_in: Packing | None
    _members: Tensor | None
    _begin: Tensor | None
    _count: Tensor | None

    def __init__(
        self,
        dest: Tensor,
        num_out: int,
        members: Tensor | None = None,
        begin: Tensor | None = None,
        count: Tensor | None = None,
        packed: Packing | None = None,
        packed_in: Packing | None = None,
    ) -> None:
        _check_dest(dest, packed, packed_in)
        check_num_out("TokenMap", num_out)
        self._set(dest.contiguous(), num_out, None, None, None, packed, packed_in)
        if packed is not None and num_out != packed.rows:
            raise ValueError(f"TokenMap: num_out must be the {packed.rows} rows of packed, got {num_out}")
        if _is_readable(dest):
            _check_slots("TokenMap", dest, num_out)
        if members is not None or begin is not None or count is not None:
            views = _checked_views(self, members=members, begin=begin, count=count)
            self._members, self._begin, self._count = views

    def _set(
        self,
        dest: Tensor,
        num_out: int,
        members: Tensor | None,
        begin: Tensor | None,
        count: Tensor | None,
        packed: Packing | None,
        packed_in: Packing | None,
    ) -> None:
        self.dest = dest
        self.num_out = num_out
        self._members = members
        self._begin = begin
        self._count = count
        self.packed = packed
        self.packed_in = packed_in

    @classmethod
    def _trusted(
        cls,
        dest: Tensor,
        num_out: int,
        members: Tensor | None = None,
        begin: Tensor | None = None,
        count: Tensor | None = None,
        packed: Packing | None = None,
        packed_in: Packing | None = None,
    ) -> TokenMap:
        """Return a map of contiguous tensors from a kernel, or of a tracer's proxies, without checks."""
        token_map = cls.__new__(cls)
        token_map._set(dest, num_out, members, begin, count, packed, packed_in)
        return token_map

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device | str | None = None) -> TokenMap:
        """Return the map that leaves each of `tokens` tokens of `batch` images in its place.

        Raises:
            TypeError: `batch` or `tokens` is not an int.
            ValueError: one of them is negative, or there are too many tokens in all.
        """
        batch = check_count("TokenMap.identity", "batch", batch, most=MAX_ROWS)
        tokens = check_count("TokenMap.identity", "tokens", tokens, most=MAX_ROWS)
        device = None if device is None else check_device("TokenMap.identity", device)
        if has_too_many(batch * tokens):
            raise ValueError(
                f"TokenMap.identity: batch * tokens must be at most {MAX_ROWS}, got batch {batch} and tokens {tokens}"
            )
        dest = torch.arange(tokens, dtype=torch.int32, device=device).repeat(batch, 1)
        members = torch.arange(batch * tokens, dtype=torch.int32, device=device)
        return cls._trusted(dest, tokens, members, members.view(batch, tokens), torch.ones_like(dest))

    @classmethod
    def from_dest(cls, dest: Tensor, num_out: int | None = None) -> TokenMap:
        """Return the map with these slots.

        Args:
            dest: (B, N), of any integer dtype: the slot of each token, -1 for a dropped token.
            num_out: the number of slots; default one more than the largest entry.

        Raises:
            TypeError: `dest` is not an integer tensor.
            ValueError: `dest` is not (B, N), or has an entry below -1 or not below `num_out`.

        The check of the entries reads them back to the host: use this to build a map by hand, not in a hot loop.
        """
        if not isinstance(dest, Tensor) or dest.is_floating_point() or dest.is_complex() or dest.dtype == torch.bool:
            got = dest.dtype if isinstance(dest, Tensor) else type(dest).__name__
            raise TypeError(f"TokenMap.from_dest: dest must be an integer tensor (B, N), got {got}")
        if dest.layout is not torch.strided or dest.is_nested or dest.is_meta:
            kind = "a meta tensor" if dest.is_meta else dest.layout
            raise TypeError(f"TokenMap.from_dest: dest must be a dense tensor with data, got {kind}")
        if dest.dim() != 2:
            raise ValueError(f"TokenMap.from_dest: dest must be (B, N), got shape {shape(dest)}")
        if dest.numel() > MAX_ROWS:
            raise ValueError(f"TokenMap.from_dest: dest may have at most {MAX_ROWS} entries, got {dest.numel()}")
        if num_out is None:
            num_out = int(dest.max()) + 1 if dest.numel() else 0
        check_num_out("TokenMap.from_dest", num_out)
        _check_slots("TokenMap.from_dest", dest, num_out)
        return cls._trusted(dest.to(torch.int32).contiguous(), num_out)

    @property
    def batch(self) -> int:
        """B, the number of images."""
        return self.dest.shape[0] if self.packed_in is None else len(self.packed_in.lengths)

    @property
    def num_tokens(self) -> int:
        """N, the number of input tokens; for packed inputs, the total over all images."""
        return self.dest.shape[-1]

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The required x.shape[:-1]: (B, N), or (T,) for packed inputs."""
        return tuple(self.dest.shape)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The y.shape[:-1] of the output: (B, N'), or (T',) for a packed map."""
        return (self.dest.shape[0], self.num_out) if self.packed is None else (self.num_out,)

    @property
    def device(self) -> torch.device:
        """The device of the map's tensors."""
        return self.dest.device

    @property
    def members(self) -> Tensor:
        """(B * N,) int32: absolute rows grouped by slot."""
        return self.views()[0]

    @property
    def begin(self) -> Tensor:
        """(B, N') int32: the start of each slot in `members`."""
        return self.views()[1]

    @property
    def count(self) -> Tensor:
        """(B, N') int32: the number of members of each slot."""
        return self.views()[2]

    def views(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return `members`, `begin` and `count`, computed from `dest` if no kernel has written them yet.

        The map keeps them, except during the capture of a CUDA graph: tensors allocated then lie in the graph's memory
        pool. Only a replay fills them, and the graph reuses their memory.
        """
        if self._members is not None and self._begin is not None and self._count is not None:
            return self._members, self._begin, self._count
        dest = self.dest if self.packed is None else self.dest.view(1, -1)
        with _outside_inference_mode():
            members, begin, count = to_csr(dest, self.num_out)
        views = members, begin.view(self.out_shape), count.view(self.out_shape)
        if not _is_captured(dest):
            self._members, self._begin, self._count = views
        return views

    def as_rows(self) -> TokenMap:
        """Return a packed map as a rectangular map of one image with all rows, for the kernels."""
        members, begin, count = self.views()
        return TokenMap._trusted(self.dest.view(1, -1), self.num_out, members, begin.view(1, -1), count.view(1, -1))

    def then(self, after: TokenMap) -> TokenMap:
        """Return this map followed by `after`: from this map's tokens to the slots of `after`, in O(B N).

        Raises:
            TypeError: `after` is not a TokenMap.
            ValueError: `after` does not take this map's slots (another B, N or packing), or is on another device.
        """
        if not isinstance(after, TokenMap):
            raise TypeError(f"TokenMap.then: after must be a TokenMap, got {type(after).__name__}")
        first, second = self.dest, after.dest
        if self.packed is None and after.packed_in is None:  # the usual case, between layers of a model
            fits = second.shape == (first.shape[0], self.num_out)
        else:
            fits = second.shape == self.out_shape and _lengths(self.packed) == _lengths(after.packed_in)
        if not fits:
            raise ValueError(f"TokenMap.then: after must map {_rows(self, out=True)}, got a map of {_rows(after)}")
        if second.device != first.device:
            raise ValueError(f"TokenMap.then: after is on {after.device}, this map on {self.device}")
        if self.packed is None:
            dest = compose(first, second)
        else:
            dest = compose(first.view(1, -1), second.view(1, -1)).view(first.shape)
        return TokenMap._trusted(dest, after.num_out, None, None, None, after.packed, self.packed_in)

    def image(self, index: int) -> TokenMap:
        """Return the rectangular map of one image, from its tokens to its slots.

        Raises:
            ValueError: `index` is not below the number of images.
        """
        check_count("TokenMap.image", "index", index)
        if index >= self.batch:
            raise ValueError(f"TokenMap.image: index must be under {self.batch}, got {index}")
        if self.packed_in is None:
            dest = self.dest[index]
        else:
            first = sum(self.packed_in.lengths[:index])
            dest = self.dest[first : first + self.packed_in.lengths[index]]
        if self.packed is None:
            return TokenMap._trusted(dest[None], self.num_out)
        first = sum(self.packed.lengths[:index])
        return TokenMap._trusted(torch.where(dest < 0, -1, dest - first)[None], self.packed.lengths[index])

    def source(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the dense (B, N', N) matrix of ToMe's code: row s has ones for the members of slot s, else zeros.

        Takes O(B N' N) memory: use it for inspection only. For a packed map it is (T', input rows).

        Raises:
            TypeError: `dtype` is not a torch.dtype.
        """
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"TokenMap.source: dtype must be a torch.dtype, got {shown(dtype)}")
        slots = torch.arange(self.num_out, dtype=torch.int32, device=self.device)
        if self.packed is not None:
            return (self.dest.view(1, -1) == slots[:, None]).to(dtype)
        return (self.dest[:, None, :] == slots[None, :, None]).to(dtype)

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> TokenMap:
        """Return the map with its tensors on `device`.

        Raises:
            TypeError, ValueError: `device` is not a torch.device, its name or its index.
        """
        device = check_device("TokenMap.to", device)

        def move(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device, non_blocking=non_blocking)

        return TokenMap._trusted(
            self.dest.to(device, non_blocking=non_blocking),
            self.num_out,
            move(self._members),
            move(self._begin),
            move(self._count),
            None if self.packed is None else self.packed.to(device, non_blocking=non_blocking),
            None if self.packed_in is None else self.packed_in.to(device, non_blocking=non_blocking),
        )

    def __repr__(self) -> str:
        return f"TokenMap({_rows(self)} -> {self._slots()}, device={self.device})"

    def _slots(self) -> str:
        return str(self.num_out) if self.packed is None else f"{list(self.packed.lengths)} packed"


def check_num_out(op: str, num_out: Any) -> None:
    """Raise unless `num_out` is a number of slots that int32 can hold."""
    check_count(op, "num_out", num_out)
    if num_out > MAX_ROWS:
        raise ValueError(f"{op}: num_out must be at most {MAX_ROWS}, got {num_out}")


def _check_int32(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"TokenMap: {name} must be an int32 tensor, got {type(value).__name__}")
    if value.dtype != torch.int32:
        raise TypeError(
            f"TokenMap: {name} must be int32, got {value.dtype}; TokenMap.from_dest takes any integer dtype"
        )
    if value.layout is not torch.strided or value.is_neg() or value._is_zerotensor():
        kind = value.layout if value.layout is not torch.strided else "a lazily negated view or a zero tensor"
        raise TypeError(f"TokenMap: {name} must be a dense (strided) tensor, got {kind}")


def _check_dest(dest: Any, packed: Any, packed_in: Any) -> None:
    """Raise unless `dest` is int32 and has the shape that the packings require."""
    _check_int32("dest", dest)
    for name, packing in (("packed", packed), ("packed_in", packed_in)):
        if packing is None:
            continue
        if not isinstance(packing, Packing):
            raise TypeError(f"TokenMap: {name} must be a Packing, got {type(packing).__name__}")
        if packing.cu_seqlens.device != dest.device:
            raise ValueError(f"TokenMap: {name} is on {packing.cu_seqlens.device}, dest on {dest.device}")
    if packed_in is not None:
        if packed is None or len(packed.lengths) != len(packed_in.lengths):
            raise ValueError("TokenMap: packed must be given with packed_in, with the same number of images")
        if dest.shape != (packed_in.rows,):
            raise ValueError(f"TokenMap: dest must have shape ({packed_in.rows},) as packed_in, got {shape(dest)}")
    elif dest.dim() != 2:
        raise ValueError(f"TokenMap: dest must be (B, N), got shape {shape(dest)}")
    elif packed is not None and len(packed.lengths) != dest.shape[0]:
        images = len(packed.lengths)
        raise ValueError(f"TokenMap: dest must have the {images} images of packed, got shape {shape(dest)}")
    if dest.numel() > MAX_ROWS:
        raise ValueError(f"TokenMap: dest may have at most {MAX_ROWS} entries, got {dest.numel()}")


def _check_slots(op: str, dest: Tensor, num_out: int) -> None:
    low, high = (int(bound) for bound in torch.aminmax(dest)) if dest.numel() else (0, -1)
    if low < -1 or high >= num_out:
        raise ValueError(
            f"{op}: dest must hold slots 0 to num_out - 1 = {num_out - 1}, or -1 for dropped, "
            f"got entries from {low} to {high}"
        )


def _checked_views(token_map: TokenMap, **views: Any) -> list[Tensor]:
    """Return `members`, `begin` and `count`, contiguous; raise unless they fit `dest`."""
    for name, view in views.items():
        _check_int32(name, view)
        expected = (token_map.dest.numel(),) if name == "members" else token_map.out_shape
        if view.shape != expected:
            raise ValueError(
                f"TokenMap: {name} must have shape {expected} as dest and num_out require, got {shape(view)}"
            )
        if view.device != token_map.device:
            raise ValueError(f"TokenMap: {name} is on {view.device}, dest on {token_map.device}")
    if _is_readable(token_map.dest):
        for (name, view), right in zip(views.items(), token_map.views(), strict=True):
            if not torch.equal(view, right):
                raise ValueError(f"TokenMap: {name} must be that of dest; leave it out to have it computed")
    return [view.contiguous() for view in views.values()]


def _is_readable(tensor: Tensor) -> bool:
    """Return whether the entries can be read at no cost: on the CPU, and nothing is being traced."""
    return tensor.is_cpu and can_bypass_dispatcher(tensor)


def _outside_inference_mode() -> AbstractContextManager[Any]:
    """Return a context outside inference mode, whose tensors cannot be saved for a backward pass."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)


def _is_captured(tensor: Tensor) -> bool:
    """Return whether work on the tensor goes into a CUDA graph. A compiler has no stream to ask about."""
    return tensor.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def _lengths(packing: Packing | None) -> tuple[int, ...] | None:
    return None if packing is None else packing.lengths


def _rows(token_map: TokenMap, out: bool = False) -> str:
    """Describe the input of a map, or its output, for a message."""
    packing = token_map.packed if out else token_map.packed_in
    if packing is not None:
        return f"batch={token_map.batch}, {list(packing.lengths)} packed tokens"
    return f"batch={token_map.batch}, {token_map.num_out if out else token_map.num_tokens} tokens"


# A pytree, so that torch.export and torch.compile pass maps in and out of graphs.
pytree.register_pytree_node(
    TokenMap,
    lambda m: ([m.dest, m.num_out, m._members, m._begin, m._count, m.packed, m.packed_in], None),
    lambda children, _: TokenMap._trusted(*children),
    serialized_type_name="tokred_kernels.TokenMap",
)
