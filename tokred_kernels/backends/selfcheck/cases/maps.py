# SPDX-License-Identifier: MIT
"""Cases of build_match_map, count_above_threshold, keep_topk, to_csr and compose. All are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tokred_kernels.backends.reference.build_match_map import build_match_map
from tokred_kernels.backends.reference.compose import compose
from tokred_kernels.backends.reference.count_above_threshold import count_above_threshold
from tokred_kernels.backends.reference.keep_topk import keep_topk
from tokred_kernels.backends.reference.rank_candidates import NO_RANK
from tokred_kernels.backends.reference.to_csr import to_csr
from tokred_kernels.backends.selfcheck.cases import compare, inputs
from tokred_kernels.backends.selfcheck.cases.match import LENGTHS, PARTITIONS, SHARES, partition_of
from tokred_kernels.partition import Partition, every_other

NAMES = {
    "build_match_map": ("dest", "members", "begin", "count"),
    "count_above_threshold": ("counts",),
    "keep_topk": ("dest", "members", "begin", "count"),
    "to_csr": ("members", "begin", "count"),
    "compose": ("dest",),
}


def _case(op: str, name: str, *arguments: Any) -> inputs.Case:
    def build() -> list[Any]:
        return [compare.exactly(*pair) for pair in zip(NAMES[op], reference_call(op, arguments), strict=True)]

    return inputs.Case(name, arguments, compare.expect(build))


def _sizes(level: inputs.Level) -> tuple[int, ...]:
    return level.sizes(1, 2, 17, 197, 577, 1089, 5001, interpreted=(1, 2, 17, 197), deep=(1024, 1025, 20000))


def _count_above_threshold_cases(op: str, level: inputs.Level) -> Iterator[inputs.Case]:
    mixed = level.compiled().mix(
        number=_sizes(level),
        mode=("threshold", "deviation", "tie", "equal", "mean"),
        own=(False, True),
        few=(False, True),
    )
    for number, mode, own, few in mixed:
        name = inputs.name_of(f"S={number} {mode}", "of each image" * own, "few scores" * few)
        draw = inputs.Draw(op, name)
        score = draw.uniform(3, number) * torch.tensor([[0.3], [1.0], [0.7]])
        if mode == "equal":
            score[:] = 1 / 3
        score[draw.uniform(3, number) < 0.1] = -torch.inf
        if few:
            score[1, 1:] = -torch.inf  # an image without a standard deviation
        threshold, divisor = {
            "threshold": (0.5, 0.0),
            "tie": (float(score[0, number // 2]), 0.0),
            "deviation": (0.0, 2.5),
            "equal": (0.0, 2.0),
            "mean": (0.0, 1e9),
        }[mode]
        yield _case(op, name, score, max(threshold, -1.0), divisor, own)


def _keep_topk_cases(op: str, level: inputs.Level) -> Iterator[inputs.Case]:
    mixed = level.compiled().mix(
        number=_sizes(level),
        share=(0.5, 1.0, 0.0, 0.02),
        layout=tuple(inputs.LAYOUTS),
        fuse=(False, True),
        first=(1, 0, 5),
    )
    for number, share, layout, fuse, first in mixed:
        first = min(first, number)  # noqa: PLW2901
        k = int((number - first) * share)
        name = inputs.name_of(f"N={number} k={k} ({share:.0%}) prefix={first} {layout}", "fused" * fuse)
        draw = inputs.Draw(op, name)
        score = draw.integers(0, number // 3 + 2, 2, number) * (draw.integers(0, 2, 2, number) * 2.0 - 1)  # -0.0, too
        if number >= 17:
            score[:, draw.orders(1, number)[0, :4]] = torch.tensor([torch.nan, torch.nan, -torch.inf, torch.inf])
        yield _case(op, name, inputs.LAYOUTS[layout](score), k, first, fuse and first + k < number)


def _to_csr_cases(op: str, level: inputs.Level) -> Iterator[inputs.Case]:
    for number, kind, share, images in level.compiled().mix(
        number=_sizes(level), kind=inputs.MAPS, share=(0.5, 1.0, 1.3, 0.0), images=(2, 1, 3)
    ):
        slots = int(number * share)
        name = f"N={number} B={images} {slots} slots ({share:.0%}), {kind}"
        yield _case(op, name, inputs.LAYOUTS["offset"](inputs.Draw(op, name).dest(images, number, slots, kind)), slots)


def _compose_cases(op: str, level: inputs.Level) -> Iterator[inputs.Case]:
    for number, kind, then, share, images in level.compiled().mix(
        number=_sizes(level), kind=inputs.MAPS, then=inputs.MAPS, share=(0.5, 1.0, 0.0), images=(2, 1, 3)
    ):
        middle = int(number * share)
        name = f"N={number} B={images} {middle} slots ({share:.0%}), {kind} then {then}"
        draw = inputs.Draw(op, name)
        first = draw.dest(images, number, middle, kind)
        yield _case(op, name, inputs.LAYOUTS["offset"](first), draw.dest(images, middle, max(1, middle // 2), then))


def _ranked(partition: Partition, images: int, draw: inputs.Draw) -> tuple[Tensor, Tensor]:
    """A partner and a rank for each source, as rank_candidates may return them."""
    first, number = partition.protected_src, partition.num_src
    partner = torch.zeros(images, number, dtype=torch.int32)
    if partition.num_dst > partition.protected_dst:
        partner = draw.integers(partition.protected_dst, partition.num_dst, images, number).int()
    rank = torch.full((images, number), NO_RANK, dtype=torch.int32)
    rank[:, first:] = draw.orders(images, max(0, number - first)).int()
    return partner, rank


def _build_match_map_cases(op: str, level: inputs.Level) -> Iterator[inputs.Case]:
    for number, kind, share, images in level.compiled().mix(
        number=_sizes(level), kind=PARTITIONS, share=SHARES, images=(2, 1, 3)
    ):
        name = f"N={number} B={images} {kind}, {share:.0%} join"
        draw = inputs.Draw(op, name)
        partition = partition_of(kind, number, share, images, draw)
        yield _case(op, name, *_ranked(partition, images, draw), partition, number, None, None, None, 0)
    for lengths, prefix, packed in (
        ((17, 17, 17), 0, False),
        ((197, 197), 1, False),
        (LENGTHS, 0, True),
        (LENGTHS, 1, True),
        ((*LENGTHS, 197), 2, True),
        (LENGTHS if level.interpreted else (*LENGTHS, 4097), 5, True),
    ):
        images, longest = len(lengths), max(lengths)
        name = f"B={images} prefix={prefix} " + ("packed" if packed else f"N={longest} counts")
        draw = inputs.Draw(op, name)
        whole = every_other(longest, longest, prefix, False, False)
        assert whole is not None
        partner, rank = _ranked(whole, images, draw)
        counts, left = torch.zeros(images, dtype=torch.int32), []
        for image, length in enumerate(lengths):
            own = every_other(length, length, prefix, False, False)
            sources = max(0, (length + 1) // 2 - whole.protected_src)
            if own is not None:
                counts[image] = draw.integers(0, own.r + 1, 1)[0] if image % 3 else own.r
            rank[image, (length + 1) // 2 :] = NO_RANK
            rank[image, whole.protected_src :][:sources] = draw.orders(1, sources)[0].int()
            if length // 2 > whole.protected_dst:
                partner[image] = draw.integers(whole.protected_dst, length // 2, partner.shape[1]).int()
            left.append(length - int(counts[image]))
        starts = inputs.row_starts(lengths) if packed else None
        rows = sum(lengths) if packed else longest
        yield _case(op, name, partner, rank, whole, rows, counts, starts, inputs.row_starts(left), sum(left))


_CASES: dict[str, Callable[[str, inputs.Level], Iterator[inputs.Case]]] = {
    "build_match_map": _build_match_map_cases,
    "count_above_threshold": _count_above_threshold_cases,
    "keep_topk": _keep_topk_cases,
    "to_csr": _to_csr_cases,
    "compose": _compose_cases,
}


def cases(op: str, level: inputs.Level) -> Iterator[inputs.Case]:
    """The cases of `op`."""
    return _CASES[op](op, level)


def reference_call(op: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The reference's outputs, as the kernels have them."""
    if op == "build_match_map":
        return build_match_map(*arguments)
    if op == "count_above_threshold":
        return (count_above_threshold(*arguments),)
    if op == "to_csr":
        return to_csr(*arguments)
    if op == "compose":
        return (compose(*arguments),)
    scores, k, first, fuse = arguments
    dest = keep_topk(scores, k, first, fuse)
    return (dest, *to_csr(dest, first + k + int(fuse)))


def timing_cases(op: str) -> Iterator[inputs.TimingCase]:
    """The maps of ViT-S at batch 64 and of long sequences at batch 8, of one dtype: they hold integers."""
    for images, number in ((64, 197), (8, 4096)):
        name = f"{images}x{number}"
        draw = inputs.Draw(op, name)
        if op == "build_match_map":
            partition = partition_of("even and odd", number, 0.5, images, draw)
            arguments: tuple[Any, ...] = (*_ranked(partition, images, draw), partition, number, None, None, None, 0)
        elif op == "count_above_threshold":
            arguments = draw.uniform(images, number // 2), 0.0, 2.0, False
        elif op == "keep_topk":
            arguments = draw.uniform(images, number), number // 2, 1, True
        elif op == "to_csr":
            arguments = draw.dest(images, number, number // 2, "few"), number // 2
        else:
            arguments = (
                draw.dest(images, number, number // 2, "few"),
                draw.dest(images, number // 2, number // 4, "few"),
            )
        yield inputs.TimingCase(name, torch.float32, arguments)
