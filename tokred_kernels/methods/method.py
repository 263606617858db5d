# SPDX-License-Identifier: MIT
"""The base class of all methods, and the checks of settings that several methods share.

Settings are checked in two steps. A method's `__post_init__` checks all that needs no model, and its errors start with
`tokred_kernels.methods.<class>`. Its `apply` checks the rest, and its errors start with `tokred_kernels.patch`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar

from torch import nn

from tokred_kernels.checks import check_count, check_flag


@dataclass(frozen=True)
class Method:
    """A token reduction method with its settings, for `tokred_kernels.patch`."""

    name: ClassVar[str]

    def __str__(self) -> str:
        return ", ".join([f'"{self.name}"', *(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))])

    @property
    def owner(self) -> str:
        """The start of error messages."""
        return f"methods.{type(self).__name__}"

    @classmethod
    def patched_module(cls, model: Any) -> Any:
        """Return the module inside `model` that is patched: `model` itself, if the method does not say otherwise."""
        return model

    def apply(self, module: nn.Module, reusable: Collection[str] = ()) -> None:
        """Check and patch a module.

        Args:
            module: the module, not patched.
            reusable: the names of trained modules from an earlier patch that are still in place, and are used again if
                they fit these settings.
        """
        raise NotImplementedError

    def check_flags(self, *names: str) -> None:
        """Raise TypeError unless each of these settings is True or False."""
        for name in names:
            check_flag(self.owner, name, getattr(self, name))

    def store(self, **values: Any) -> None:
        """Set settings to their normal form, in `__post_init__`."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


def ascending_layers(owner: str, layers: Any) -> tuple[int, ...]:
    """Return `layers` as a tuple of block indices.

    Raises:
        TypeError: `layers` is not a tuple or list of ints.
        ValueError: `layers` is empty, has a negative index, or does not ascend.
    """
    if not isinstance(layers, (tuple, list)):
        raise TypeError(f"tokred_kernels.{owner}: layers must be a tuple of ints, got {layers!r}")
    if not layers:
        raise ValueError(f"tokred_kernels.{owner}: layers must name at least one block, got none")
    indices = tuple(check_count(owner, "layers", layer) for layer in layers)
    if any(after <= before for before, after in pairwise(indices)):
        raise ValueError(f"tokred_kernels.{owner}: layers must ascend, got {indices}")
    return indices


def check_layers_exist(method: Any, num_blocks: int) -> None:
    """Raise ValueError unless the model has all blocks in the method's `layers`; the message mentions the default."""
    if method.layers[-1] >= num_blocks:
        default = type(method).layers
        advice = f" from the default layers={default}; give layers for this model" if method.layers == default else ""
        raise ValueError(
            f"tokred_kernels.patch: layers must be from 0 to {num_blocks - 1}, the model's last block, got "
            f"{method.layers[-1]}{advice}"
        )


def check_shares(owner: str, name: str, share: Any, num_layers: int, default: Any = None) -> Any:
    """Return `share`, a share of tokens for all layers or a sequence with one per layer, with a list as a tuple.

    Raises:
        TypeError: a share is not a number.
        ValueError: a share is not above 0 and at most 1, or their number is wrong; the message mentions the default.
    """
    several = isinstance(share, (tuple, list))
    shares = tuple(share) if several else (share,)
    if several and len(shares) != num_layers:
        advice = f" from the default {name}={default}; give {name} for these layers" if shares == default else ""
        raise ValueError(
            f"tokred_kernels.{owner}: {name} must have one number for each of {num_layers} layers, got {len(shares)}"
            + advice
        )
    for value in shares:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"tokred_kernels.{owner}: {name} must be a number, or a list of numbers, got {share!r}")
        if not 0 < value <= 1:
            raise ValueError(f"tokred_kernels.{owner}: {name} must be above 0 and at most 1, got {value}")
    return shares if several else share


def share_texts(share: Any, num_layers: int) -> list[str]:
    """Return the share of each layer as text, which a reducer converts back with `float`.

    torch.compile makes a float attribute that changes a symbolic input, and fails when a token count is computed from
    it. Text is always a constant, and a changed text recompiles.
    """
    shares = share if isinstance(share, tuple) else (share,) * num_layers
    return [repr(float(one)) for one in shares]
