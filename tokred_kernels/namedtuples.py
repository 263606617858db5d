# SPDX-License-Identifier: MIT
"""Named tuples with some fields changed."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

T = TypeVar("T", bound=NamedTuple)


def namedtuple_replace(record: T, **fields: Any) -> T:
    """`record` with other `fields`: its `_replace`, for torch.compile.

    There, torch 2.6 does not follow `_replace`, and 2.11 makes a tuple of nothing of it where a graph breaks.
    For the same reason these tuples compute by methods: torch 2.6 does not follow the properties of a named tuple.
    """
    own: Any = type(record)
    for name in fields:
        if name not in own._fields:
            raise ValueError(f"{own.__name__} has no field {name!r}")
    return own(*[fields.get(name, value) for name, value in zip(own._fields, record, strict=True)])
