# SPDX-License-Identifier: MIT
"""Write files in one step, and read JSON files whose content may be wrong."""

from __future__ import annotations

import contextlib
import json
import os
import reprlib
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` in one step: after a failure, the file still has its old content.

    The text goes to a temporary file in the same folder, which then replaces the file. The file keeps its permissions,
    and a new file gets those that `open` gives. A symbolic link stays, and its target is replaced. A device or a pipe
    is written directly.

    Raises:
        OSError: the file cannot be written.
    """
    mode = None
    with contextlib.suppress(FileNotFoundError), open(os.open(path, os.O_WRONLY), "w", encoding="utf-8") as old:
        mode = os.fstat(old.fileno()).st_mode
        if not stat.S_ISREG(mode):
            old.write(text)
            return
    folder, name = os.path.split(os.path.realpath(path))
    unfinished = os.path.join(folder, f".{name[:32]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(unfinished, "x", encoding="utf-8") as file:
            if mode is not None:
                os.chmod(unfinished, stat.S_IMODE(mode))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, os.path.join(folder, name))
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            os.unlink(unfinished)
        raise


def replace_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as indented JSON, by `replace_text`.

    Raises:
        OSError: the file cannot be written.
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(where: str, path: str | os.PathLike[str]) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or has a name twice in one object. The message starts with `where`.
    """
    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be JSON ({error})") from None


def check_fields(where: str, value: Any, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    """Raise ValueError unless `value` is a dict with the fields `required`, and no others than these and `optional`."""
    required, optional = tuple(required), tuple(optional)
    names = ", ".join(required)
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object with {names}, got {reprlib.repr(value)}")
    missing = [name for name in required if name not in value]
    unknown = [name for name in value if name not in required + optional]
    if missing or unknown:
        found = f"missing: {', '.join(missing) or 'none'}, unknown: {reprlib.repr(unknown)}"
        raise ValueError(f"{where} must have {names}; {found}")


def check_number(where: str, value: Any, kind: type, least: float, most: float) -> None:
    """Raise ValueError unless `value` is a number from `least` to `most`, and an int if `kind` is int."""
    accepted: Any = int if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted) or not least <= value <= most:
        noun = "an int" if kind is int else "a number"
        raise ValueError(f"{where} must be {noun} from {least} to {most}, got {reprlib.repr(value)}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content
