# SPDX-License-Identifier: MIT
"""Kernels that are known to be wrong somewhere; the self-check does not run them there."""

from __future__ import annotations

from typing import NamedTuple


class KnownBad(NamedTuple):
    """One op of one backend on one architecture with one Triton version; None stands for any.

    `architecture` is as in the key of the cache: "sm_90", "gfx942". `triton` is a prefix of its version, such as "3.6".
    """

    backend: str
    op: str
    architecture: str | None
    triton: str | None
    reason: str


KNOWN_BAD: tuple[KnownBad, ...] = ()


def reason_known(backend: str, op: str, architecture: str, triton: str) -> str | None:
    """Return why this combination must not be used, or None."""
    for bad in KNOWN_BAD:
        if (
            (bad.backend, bad.op) == (backend, op)
            and bad.architecture in (None, architecture)
            and (bad.triton is None or triton.startswith(bad.triton))
        ):
            return bad.reason
    return None
