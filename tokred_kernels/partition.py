# SPDX-License-Identifier: MIT
"""Which tokens can join which: the only difference between the selectors that use the match kernel."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tokred_kernels.namedtuples import namedtuple_replace


class Partition(NamedTuple):
    """Sources, destinations, protected tokens, and the layout of the slots; csrc/common/args.h has the formulas.

    Either `sources` and `destinations` list tokens, (B, num_src) and (B, num_dst) int32, or both are None and they are
    arithmetic: after `first` untouched tokens, the last of every `stride` tokens is a destination; with stride 1 the
    destinations come first and the sources are the rest.
    """

    first: int
    stride: int
    num_src: int
    num_dst: int
    protected_src: int
    protected_dst: int
    sources_by_index: bool
    r: int
    sources: Tensor | None = None
    destinations: Tensor | None = None

    def numbers(self) -> tuple[int, ...]:
        """Return all fields except the lists, in the order of `SCHEMA`; `Partition(*numbers)` is the inverse."""
        # Not self[:8]: torch.compile of torch 2.6 does not follow a slice of a named tuple.
        protected = self.protected_src, self.protected_dst
        return self.first, self.stride, self.num_src, self.num_dst, *protected, self.sources_by_index, self.r

    def of_tokens(self, tokens: int) -> Partition:
        """Return the same split into even and odd for another number of tokens, for packed images."""
        return namedtuple_replace(self, num_src=(tokens + 1) // 2, num_dst=tokens // 2)

    def num_out(self) -> int:
        """N', the number of slots."""
        return self.first + self.num_src - self.r + self.num_dst


# The numbers of a partition among the arguments of a registered op.
SCHEMA = (
    "SymInt first, SymInt stride, SymInt num_src, SymInt num_dst, SymInt protected_src, SymInt protected_dst, "
    "bool sources_by_index, SymInt r"
)
METRIC_RULE = "float (B, N, D) or (B, H, N, D); B * N <= ROWS and 0 not in metric.shape[1:-2]"
# Their rules for images of N tokens; see `backends.arguments`.
RULES = {
    "sources": "int32 (B, num_src); entries(sources, 0, N)",
    "destinations": "int32 (B, num_dst); entries(destinations, 0, N)",
    "first": "0 <= first <= N",
    "stride": "1 <= stride <= ROWS and (sources is None) == (destinations is None)",
    "num_src": "num_src >= 0 and first + (num_src + num_dst if stride == 1 or sources is not None"
    " else max(num_src + (num_src - 1) // (stride - 1), 0)) <= N",
    "num_dst": "num_dst >= 0 and (sources is not None or stride == 1 or first + num_dst * stride <= N)",
    "protected_src": "0 <= protected_src <= num_src",
    "protected_dst": "0 <= protected_dst <= num_dst",
    "r": "0 <= r <= num_src - protected_src and (r == 0 or protected_dst < num_dst)",
}
NO_LISTS = {"sources": "None", "destinations": "None"}  # for an op without these arguments
# Their rules for packed images: N is the longest length, and each image is split into even and odd tokens.
PACKED_RULES = {
    "stride": "stride == 2 and first == 0 and sources is None and destinations is None",
    "num_src": "0 <= num_src - num_dst <= 1",
    "N": "num_src + num_dst",
}


def every_other(tokens: int, r: int, prefix: int | None, class_token: bool, distill_token: bool) -> Partition | None:
    """Return ToMe's split into even sources and odd destinations; None if nothing can be merged.

    `prefix` protects that many leading tokens; if it is None, ToMe's two flags say which tokens are protected.
    """
    if prefix is None:
        protected_src, protected_dst, by_index = int(class_token), int(distill_token), class_token
    else:
        protected_src, protected_dst, by_index = (prefix + 1) // 2, prefix // 2, prefix > 0
    limit = (tokens - protected_src - protected_dst) // 2
    if r > limit:  # not min(): if tokens is symbolic, a branch keeps r a plain number
        r = limit
    num_dst = tokens // 2
    # Three tokens with only a distillation token: ToMe's count lets one token go, but no destination can be joined.
    if r <= 0 or num_dst <= protected_dst:
        return None
    return Partition(0, 2, (tokens + 1) // 2, num_dst, protected_src, protected_dst, by_index, r)


def prefix_and_rest(tokens: int, num_kept: int, first: int) -> Partition:
    """Return the partition whose destinations are the tokens from `first` to `num_kept`; all later tokens join."""
    return Partition(first, 1, tokens - num_kept, num_kept - first, 0, 0, False, tokens - num_kept)


def every_kth(tokens: int, k: int, prefix: int) -> Partition:
    """Return the partition whose destinations are every k-th token after the prefix; the tail is dropped."""
    num_dst = (tokens - prefix) // k
    num_src = num_dst * (k - 1)
    return Partition(prefix, k, num_src, num_dst, 0, 0, False, num_src)
