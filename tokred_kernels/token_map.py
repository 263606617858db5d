# SPDX-License-Identifier: MIT
"""The token map: where each token goes. Every selector makes one, every mover follows one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tokred_kernels.checks import MAX_ROWS, check_count, shape
from tokred_kernels.ops.compose import compose
from tokred_kernels.ops.invert import invert


class TokenMap:
    """Where each of N tokens goes, for every image of a batch: into one of `num_out` slots, or nowhere.

    Shapes: B images, N tokens, N' = `num_out` slots. All tensors are int32 and on one device.

    Attributes:
        dest: (B, N), the slot of each token, -1 where the token is dropped.
        num_out: N', the same for every image.
        members: (B * N,), the absolute rows b * N + n of the kept tokens, grouped by slot and ascending inside a slot;
            image b owns members[b * N : (b + 1) * N], whose unused tail holds -1.
        begin: (B, N'), where a slot's members start in `members`.
        count: (B, N'), how many members a slot has; 0 is allowed.

    `members`, `begin` and `count` say the same as `dest`; a selector writes both views, and a map that was made from
    `dest` alone makes them when they are first asked for.
    """

    def __init__(
        self,
        dest: Tensor,
        num_out: int,
        members: Tensor | None = None,
        begin: Tensor | None = None,
        count: Tensor | None = None,
    ) -> None:
        self.dest = dest
        self.num_out = num_out
        self._members = members
        self._begin = begin
        self._count = count

    @classmethod
    def identity(cls, batch: int, tokens: int, device: torch.device | str | None = None) -> TokenMap:
        """The map that leaves each of `tokens` tokens of `batch` images where it is."""
        dest = torch.arange(tokens, dtype=torch.int32, device=device).repeat(batch, 1)
        members = torch.arange(batch * tokens, dtype=torch.int32, device=device)
        return cls(dest, tokens, members, members.view(batch, tokens), torch.ones_like(dest))

    @classmethod
    def from_dest(cls, dest: Tensor, num_out: int | None = None) -> TokenMap:
        """A map from the slot of each token.

        Args:
            dest: (B, N), any integer dtype, -1 for a token that is dropped.
            num_out: the number of slots; default one more than the largest entry.

        Raises:
            TypeError: `dest` is no integer tensor.
            ValueError: `dest` is not (B, N), or has an entry under -1 or of at least `num_out`.

        Checking the entries reads them back to the host: call this when building a map by hand, not in a hot loop.
        """
        if not isinstance(dest, Tensor) or dest.is_floating_point() or dest.is_complex() or dest.dtype == torch.bool:
            got = dest.dtype if isinstance(dest, Tensor) else type(dest).__name__
            raise TypeError(f"TokenMap.from_dest: dest must be an integer tensor (B, N), got {got}")
        if dest.dim() != 2:
            raise ValueError(f"TokenMap.from_dest: dest must be (B, N), got shape {shape(dest)}")
        if dest.numel() > MAX_ROWS:
            raise ValueError(f"TokenMap.from_dest: dest may have at most {MAX_ROWS} entries, got {dest.numel()}")
        low, high = (int(dest.min()), int(dest.max())) if dest.numel() else (0, -1)
        if num_out is None:
            num_out = high + 1
        check_count("TokenMap.from_dest", "num_out", num_out)
        if low < -1 or high >= num_out:
            raise ValueError(
                f"TokenMap.from_dest: dest must hold slots 0 to num_out - 1 = {num_out - 1}, or -1 for dropped, "
                f"got entries from {low} to {high}"
            )
        return cls(dest.to(torch.int32).contiguous(), num_out)

    @property
    def batch(self) -> int:
        """B, the number of images."""
        return self.dest.shape[0]

    @property
    def num_tokens(self) -> int:
        """N, the number of tokens that go in."""
        return self.dest.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the map's tensors are."""
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
        """`members`, `begin` and `count`, made from `dest` if no kernel has written them yet."""
        if self._members is None or self._begin is None or self._count is None:
            self._members, self._begin, self._count = invert(self.dest, self.num_out)
        return self._members, self._begin, self._count

    def then(self, after: TokenMap) -> TokenMap:
        """This map followed by `after`: from this map's tokens to the slots of `after`, in O(B N).

        Raises:
            TypeError: `after` is no TokenMap.
            ValueError: `after` does not take this map's slots (another B or N), or is on another device.
        """
        if not isinstance(after, TokenMap):
            raise TypeError(f"TokenMap.then: after must be a TokenMap, got {type(after).__name__}")
        first, second = self.dest, after.dest
        if second.shape != (first.shape[0], self.num_out):
            raise ValueError(
                f"TokenMap.then: after must map ({self.batch}, {self.num_out}) tokens, "
                f"got a map of ({after.batch}, {after.num_tokens}) tokens"
            )
        if second.device != first.device:
            raise ValueError(f"TokenMap.then: after is on {after.device}, this map on {self.device}")
        return TokenMap(compose(first, second), after.num_out)

    def source(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense (B, N', N) matrix of zeros and ones that published code carries: row s marks the members of slot s.

        O(B N' N) memory: for looking at, not for computing with.
        """
        slots = torch.arange(self.num_out, dtype=torch.int32, device=self.device)
        return (self.dest[:, None, :] == slots[None, :, None]).to(dtype)

    def to(self, device: torch.device | str) -> TokenMap:
        """The map with its tensors on `device`."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return TokenMap(self.dest.to(device), self.num_out, move(self._members), move(self._begin), move(self._count))

    def __repr__(self) -> str:
        return f"TokenMap(batch={self.batch}, {self.num_tokens} tokens -> {self.num_out}, device={self.device})"


# A pytree, so that torch.export and torch.compile pass maps in and out of graphs.
pytree.register_pytree_node(
    TokenMap,
    lambda m: ([m.dest, m.num_out, m._members, m._begin, m._count], None),
    lambda children, _: TokenMap(*children),
    serialized_type_name="tokred_kernels.TokenMap",
)
