# SPDX-License-Identifier: MIT
"""Command-line options that several scripts have."""

from __future__ import annotations

import argparse

import torch

DEVICE_HELP = "default: cuda if there is a GPU"


def chosen_device(parser: argparse.ArgumentParser, named: str | None) -> str:
    """Return the device that --device names, or the default; call `parser.error` if there is none."""
    device = named or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    return device


def chosen_names(parser: argparse.ArgumentParser, option: str, text: str | None, known: tuple[str, ...]) -> list[str]:
    """Return the names that an option lists, separated by commas; none without the option."""
    names = [name.strip() for name in text.split(",") if name.strip()] if text is not None else []
    unknown = [name for name in names if name not in known]
    if unknown or (text is not None and not names):
        parser.error(f"{option} must name some of {', '.join(known)}, got {(unknown or [text])[0]!r}")
    return names
