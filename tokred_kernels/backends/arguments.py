# SPDX-License-Identifier: MIT
"""Check the arguments of registered ops called through the dispatcher, by one rule for each argument.

The public functions check their arguments and call kernels directly. `torch.ops.tokred.*` can be called with anything,
and kernels take raw addresses, so the registered implementations check what memory safety needs.

A rule for a tensor is "dtype (dimensions)", with alternatives by rank: "float (B, N, D) or (B, H, N, D)". The dtypes
are "float", the one floating-point dtype of the call, with any strides; "dense", the same dtype, made contiguous;
"sums", the dtype of its sums; and "int32" and "float32". All but "float" are made contiguous. A capital letter is a
dimension, bound at its first occurrence; everything else in a rule is a Python expression of dimensions and arguments.
A condition on the tensor's entries can follow after ";". It is evaluated on the CPU only; on a GPU that would wait for
the device.

A rule for another argument is a condition. A rule for a capital letter binds the letter.

A condition that holds is True or None. One that fails is False, or a text that completes "the argument must ...".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.checks import MAX_ROWS, check_dense, check_floating, shape
from tokred_kernels.ops.registry import KERNEL_BACKENDS, SPECS

NO_RANK = torch.iinfo(torch.int32).max
_FIXED = {"int32": torch.int32, "float32": torch.float32}
_TENSOR = re.compile(r"(\w+) (\([^;]*\))(?:; (.*))?")


def checker(
    schema: torch.FunctionSchema, rules: Mapping[str, str], packed: Mapping[str, str] | None = None, by: str = ""
) -> Callable[..., list[Any]]:
    """Return a function that checks an op's arguments, and returns them with contiguous tensors as the rules say.

    If the argument `by` is not None, the rules in `packed` override or complete `rules`.
    """
    op = schema.name.rpartition(":")[2]
    names = [argument.name for argument in schema.arguments]
    required = {argument.name for argument in schema.arguments if str(argument.type) == "Tensor"}
    plain = _Rules(op, names, required, rules)
    other = plain if packed is None else _Rules(op, names, required, {**rules, **packed})
    place = names.index(by) if by else 0

    def check(*arguments: Any) -> list[Any]:
        return (other if by and arguments[place] is not None else plain).check(arguments)

    return check


class _Rules:
    def __init__(self, op: str, names: list[str], required: set[str], rules: Mapping[str, str]) -> None:
        self.op, self.names, self.required = op, names, required
        self.tensors: list[tuple[str, str, list[list[str]]]] = []
        self.conditions: list[tuple[str, str, Any, bool]] = []
        self.bound: list[tuple[str, Any]] = []
        for name, rule in rules.items():
            match = _TENSOR.fullmatch(rule)
            condition = match[3] if match else rule
            if match:
                shapes = [text.strip("() ,").split(", ") for text in match[2].split(" or ")]
                self.tensors.append((name, match[1], [[] if one == [""] else one for one in shapes]))
            if name not in names:
                self.bound.append((name, compile(rule, rule, "eval")))
            elif condition:
                self.conditions.append((name, condition, compile(condition, condition, "eval"), match is not None))

    def check(self, arguments: tuple[Any, ...]) -> list[Any]:
        values = dict(zip(self.names, arguments, strict=True))
        missing = next((name for name in self.names if name in self.required and values[name] is None), None)
        if missing is not None:  # torch passes None for a Tensor
            raise TypeError(f"tokred_kernels.{self.op}: {missing} must be a torch.Tensor, got NoneType")
        first = next(value for value in arguments if isinstance(value, Tensor))
        self._check_backend(values["backend"], first)
        floats = next((values[name].dtype for name, kind, _ in self.tensors if kind == "float"), None)
        for name, kind, shapes in self.tensors:
            if values[name] is not None:
                self._check_tensor(name, kind, values[name], shapes, values, first, floats)
        for name, expression in self.bound:
            values[name] = self._evaluate(expression, values)
        for name, text, condition, reads in self.conditions:
            if reads and (values[name] is None or not first.is_cpu):
                continue
            fault = self._evaluate(condition, values)
            if fault is not None and fault is not True:
                wording = f"satisfy {text} with {_sizes(text, values)}" if fault is False else fault
                raise ValueError(f"tokred_kernels.{self.op}: {name} must {wording}")
        for name, kind, _ in self.tensors:
            if kind != "float" and values[name] is not None:
                values[name] = values[name].contiguous()
        return [values[name] for name in self.names]

    def _check_backend(self, backend: str, first: Tensor) -> None:
        if backend not in KERNEL_BACKENDS:
            known = ", ".join(KERNEL_BACKENDS)
            raise ValueError(f"tokred_kernels.{self.op}: backend must be one of {known}, got {backend!r}")
        reason = backends.can_run(self.op, backend, first.device, first.dtype)
        if reason is not None:
            raise RuntimeError(f"tokred_kernels.{self.op}: backend {backend!r} cannot run this call: {reason}")

    def _check_tensor(
        self,
        name: str,
        kind: str,
        value: Tensor,
        shapes: list[list[str]],
        values: dict[str, Any],
        first: Tensor,
        floats: torch.dtype | None,
    ) -> None:
        if kind == "float":
            check_floating(self.op, name, value)
        else:
            check_dense(self.op, name, value)
        if value.device != first.device:
            raise ValueError(f"tokred_kernels.{self.op}: {name} must be on {first.device}, got {value.device}")
        if kind == "sums":
            wanted: torch.dtype | None = torch.float64 if floats is torch.float64 else torch.float32
        else:
            wanted = _FIXED.get(kind) or floats
        if value.dtype != wanted:
            raise TypeError(f"tokred_kernels.{self.op}: {name} must be {wanted}, got {value.dtype}")
        dimensions = next((one for one in shapes if len(one) == value.dim()), None)
        if dimensions is None or not self._fits(value, dimensions, values):
            wording = " or ".join(f"({', '.join(one)})" for one in shapes)
            sizes = _sizes(wording, values)
            raise ValueError(
                f"tokred_kernels.{self.op}: {name} must be {wording} with {sizes}, got shape {shape(value)}"
            )

    def _fits(self, value: Tensor, dimensions: list[str], values: dict[str, Any]) -> bool:
        sizes = zip(dimensions, value.shape, strict=True)
        return all(
            values.setdefault(dimension, size) == size
            if len(dimension) == 1
            else self._evaluate(dimension, values) == size
            for dimension, size in sizes
        )

    def _evaluate(self, expression: Any, values: dict[str, Any]) -> Any:
        return eval(expression, _FUNCTIONS, values)


def _sizes(text: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the names in a rule."""
    return {key: values[key] for key in re.findall(r"\w+", text) if isinstance(values.get(key), (int, str))}


def _entries(value: Tensor, low: int, high: int) -> str | None:
    """Require entries from `low` to below `high`."""
    if value.numel() == 0:
        return None
    lowest, highest = (number.item() for number in value.aminmax())
    if low <= lowest and highest < high:
        return None
    return f"have entries from {low} to {high - 1}, got entries from {lowest} to {highest}"


def _segments(members: Tensor, begin: Tensor, count: Tensor, rows: int, dest: Tensor | None = None) -> str | None:
    """Require that `begin` and `count` give parts of `members` that hold rows; with `dest`, those of each slot."""
    size = members.numel()
    counts, starts = count.flatten().long(), begin.flatten().long()
    if bool((counts < 0).any()) or int(counts.sum()) > size:
        return f"be 0 or more, with a sum of at most {size}, the number of members"
    own = counts > 0
    if bool(((starts < 0) | (starts + counts > size))[own].any()):
        return f"lie, with begin, inside the {size} members"
    slot = torch.repeat_interleave(counts)
    offset = torch.arange(slot.numel()) - (counts.cumsum(0) - counts)[slot]
    used = members[(starts[slot] + offset)].long()
    if bool(((used < 0) | (used >= rows)).any()):
        return f"name members that are rows from 0 to {rows - 1}"
    if dest is None:
        return None
    tokens, slots = dest.shape[1], begin.shape[1]
    absolute = torch.where(dest < 0, -1, dest + torch.arange(dest.shape[0])[:, None] * slots).flatten()
    expected = torch.full((dest.shape[0] * tokens,), -1).index_put((used,), slot)
    return None if torch.equal(absolute, expected) else "say, with members and begin, the same as dest"


def _starts(starts: Tensor, rows: int, longest: int) -> str | None:
    """Require that `starts` ascends from 0 to `rows`, in steps of at most `longest`."""
    steps = starts.long().diff()
    fits = starts.numel() and starts[0] == 0 and starts[-1] == rows
    if fits and bool((steps >= 0).all()) and int(steps.max() if steps.numel() else 0) <= longest:
        return None
    return f"ascend from 0 to {rows} in steps of at most {longest}, got {starts.tolist()[:9]}"


def _follows(starts: Tensor, lengths: Tensor, rows: int) -> str | None:
    """Require the starts of images of these lengths, with `rows` rows in all."""
    expected = [0, *lengths.long().cumsum(0).tolist()]
    if starts.tolist() == expected and expected[-1] == rows:
        return None
    return f"be {expected} with num_out {expected[-1]}, got {starts.tolist()} with {rows}"


def _lengths(starts: Tensor | None, images: int, tokens: int) -> Tensor:
    return torch.full((images,), tokens) if starts is None else starts.long().diff()


def _ranks(rank: Tensor, protected: int, sources: Tensor) -> str | None:
    """Require the ranks 0, 1, ... for the unprotected among the first `sources` of each row, NO_RANK for all others."""
    number = torch.arange(rank.shape[1])
    eligible = (number >= protected) & (number < sources[:, None])
    places = torch.where(eligible, rank, NO_RANK).long().sort(dim=1).values
    expected = torch.where(number < eligible.sum(1, keepdim=True), number, NO_RANK)
    if torch.equal(places, expected) and bool((rank[~eligible] == NO_RANK).all()):
        return None
    return f"hold each place once, from 0, and {NO_RANK} for sources that cannot join"


def _partners(partner: Tensor, starts: Tensor) -> str | None:
    """Require that the partners of each image are odd tokens of the same image."""
    limit = (starts.long().diff() // 2).clamp(min=1)
    if bool(((partner >= 0) & (partner < limit[:, None])).all()):
        return None
    return f"have entries from 0 to below half of the image's tokens, {limit.tolist()[:9]}"


def _joinable(counts: Tensor, starts: Tensor, protected_src: int, protected_dst: int) -> str | None:
    """Require that each image has that many sources that can join, and a destination for them."""
    tokens = starts.long().diff()
    limit = torch.where(tokens // 2 > protected_dst, (tokens + 1) // 2 - protected_src, 0).clamp(min=0)
    if bool(((counts >= 0) & (counts <= limit)).all()):
        return None
    return f"be from 0 to the number of sources of each image that can join, {limit.tolist()[:9]}"


_FUNCTIONS = {
    "ROWS": MAX_ROWS,
    "max_head_dim": lambda op, backend: SPECS[op].max_head_dim.get(backend, MAX_ROWS),
    "entries": _entries,
    "segments": _segments,
    "starts_of": _starts,
    "follows": _follows,
    "lengths": _lengths,
    "ranks": _ranks,
    "partners": _partners,
    "joinable": _joinable,
    "int": int,
    "max": max,
}
