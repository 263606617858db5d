# SPDX-License-Identifier: MIT
"""Replace fields of named tuples under torch.compile."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

T = TypeVar("T", bound=NamedTuple)


def namedtuple_replace(record: T, **fields: Any) -> T:
    """Return `record` with other `fields`, like its `_replace`.

    torch.compile does not support `_replace` in torch 2.6, and loses the fields at a graph break in 2.11. Similarly,
    named tuples here have methods instead of properties, which torch 2.6 does not support.
    """
    own: Any = type(record)
    for name in fields:
        if name not in own._fields:
            raise ValueError(f"{own.__name__} has no field {name!r}")
    return own(*[fields.get(name, value) for name, value in zip(own._fields, record, strict=True)])
