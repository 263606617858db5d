# SPDX-License-Identifier: MIT
"""transformers' supported models and their parts; `models/base.py` describes the functions.

Classes are looked up in the module of the model's own class, so nothing of transformers is imported here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

from torch import nn

from tokred_kernels.models.imports import check_version
from tokred_kernels.models.patched import Patched, PatchInfo
from tokred_kernels.models.reducer import BlockReducer
from tokred_kernels.models.spec import (
    OWN_BLOCK,
    PATCH_INFO,
    REDUCER,
    SUPPORTED,
    TRACE,
    BlockSpec,
    ModelSpec,
    check_not_replaced,
)
from tokred_kernels.models.state import ForwardTrace
from tokred_kernels.models.transformers.families import FAMILIES, Family, Wrapper
from tokred_kernels.models.transformers.patched import (
    PatchedAttention,
    PatchedEncoder,
    PatchedLayer,
    PatchedMeanClassifier,
    PatchedProbe,
    PatchedProbeEncoder,
    PatchedWrapper,
    check_attention,
    classifier_forward,
    encoder_forward,
    grid_of,
    sides,
)

OLDEST = (5, 18)
FOLDER = re.compile(r"transformers\.models\.(\w+)\.")


def supports(model: Any) -> bool:
    """Return whether the class of an unpatched model is supported."""
    family, wrapper = _family(type(model)), _wrapper(type(model))
    if isinstance(model, PatchedWrapper):
        return not isinstance(encoder_of(model), Patched)  # its encoder was unpatched without it
    if family is None or not _is_own(type(model)):
        return False
    return wrapper is not None or _is(model, family, family.layout.encoder)


def check(model: Any) -> None:
    """Raise unless this adapter supports the version of transformers and all parts of the model."""
    check_version(sys.modules["transformers"], OLDEST)
    encoder = encoder_of(model)
    if isinstance(encoder, Patched):
        raise ValueError(
            f"tokred_kernels.patch: the {type(encoder).__name__} inside is already patched "
            f"({getattr(encoder, PATCH_INFO)}); call tokred_kernels.unpatch on it first"
        )
    check_attention(encoder.config)
    family: Any = _family(type(model))
    layout = family.layout
    if not _is(encoder, family, layout.encoder):
        raise NotImplementedError(
            f"tokred_kernels.patch: this {type(model).__name__} has a {type(encoder).__module__}."
            f"{type(encoder).__name__} as its encoder, which is not supported; supported are "
            f"{SUPPORTED['transformers']}"
        )
    layers = encoder.get_submodule(layout.layers)
    for index, layer in enumerate(layers):
        parts = ((layer, layout.layer), (getattr(layer, layout.attention, None), "Attention"))
        for part, name in parts:
            if not _is(part, family, name):
                raise NotImplementedError(
                    f"tokred_kernels.patch: layer {index} of this {type(encoder).__name__} has a "
                    f"{type(part).__module__}.{type(part).__name__} instead of a {family.stem}{name}, which is not "
                    f"supported; supported are {SUPPORTED['transformers']}. You can {OWN_BLOCK}"
                )
    head = has_probe(encoder)
    if head and not _is(encoder.head, family, family.probe):
        raise NotImplementedError(
            f"tokred_kernels.patch: the head of this {type(encoder).__name__} is a {type(encoder.head).__module__}."
            f"{type(encoder.head).__name__}, which can ignore the token sizes; supported are "
            f"{family.stem}{family.probe} and torch.nn.Identity"
        )
    ours = [encoder, layers[0], getattr(layers[0], layout.attention)] if layers else [encoder]
    ours += [encoder.head] if head else []
    ours += [model] if model is not encoder and _wrapper(type(model)).mean else []  # type: ignore[union-attr]
    check_not_replaced(model, tuple(map(type, ours)), "patch the model first, and add those afterwards")


def model_spec(model: Any) -> ModelSpec:
    """See `models.base`."""
    encoder = encoder_of(model)
    family: Any = _family(type(encoder))
    layers, config, head = encoder.get_submodule(family.layout.layers), encoder.config, has_probe(encoder)
    return ModelSpec(
        encoder,
        layers,
        tuple(_block_spec(layer, getattr(layer, family.layout.attention), config) for layer in layers),
        prod(grid_of(config, sides(config.image_size))),
        family.num_prefix(config),
        has_class_token=family.leading > 0,
        embed_dim=config.hidden_size,
        grid=None,
        gridless_embed=None,
        supports_packing=False,
        pool="attention" if head else "the class token, or a mean",
        pools_masked=not head,
    )


def _block_spec(layer: Any, attention: Any, config: Any) -> BlockSpec:
    inner = config.num_attention_heads * attention.head_dim
    return BlockSpec(attention, layer.mlp, config.hidden_size, inner, attention.head_dim)


def has_probe(encoder: Any) -> bool:
    """Return whether the encoder's head pools by attention. A patched encoder's `use_head` is always False."""
    family: Any = _family(type(encoder))
    return family.probe is not None and encoder.__dict__["use_head"] and type(encoder.head) is not nn.Identity


def install(model: Any, info: PatchInfo, reducers: Callable[[int], BlockReducer]) -> None:
    """See `models.base`."""
    encoder = encoder_of(model)
    family: Any = _family(type(encoder))
    for index, layer in enumerate(encoder.get_submodule(family.layout.layers)):
        _take_patched_class(getattr(layer, family.layout.attention))
        _take_patched_class(layer)
        setattr(layer, REDUCER, reducers(index))
    if has_probe(encoder):
        _take_patched_class(encoder.head)
    setattr(encoder, PATCH_INFO, info)
    setattr(encoder, TRACE, ForwardTrace())
    _take_patched_class(encoder)
    if model is not encoder:
        _take_patched_class(model)


def encoder_of(model: Any) -> Any:
    """Return the module that runs the layers of a model, patched or not, and carries its patch info."""
    wrapper = _wrapper(type(model))
    return model if wrapper is None else getattr(model, wrapper.encoder)


class SameName:
    """Base of patched classes that have the name of the original.

    transformers looks up classes by name: for the outputs that it can record, for modules that it must not split over
    devices, and for what `save_pretrained` writes into the configuration.
    """

    original: Any

    def _get_name(self) -> str:
        return f"Patched{self.original.__name__}"  # what print(model) shows

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the original class, because the name of the patched class is that of the original."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _bare, (self.original,), *reduced[2:]


def _take_patched_class(module: Any) -> None:
    kind: Any = type(module)
    if not isinstance(module, Patched):
        module.__class__ = patched_class(kind)


def _bare(original: Any) -> Any:
    kind = patched_class(original)
    return kind.__new__(kind)


@cache
def patched_class(original: Any) -> Any:
    """Return the class that a module of class `original` has while it is patched."""
    family: Any = _family(original)
    wrapper, ending = _wrapper(original), original.__name__.removeprefix(family.stem)
    names = ("__module__", "__qualname__", "__doc__")
    fields = {name: getattr(original, name) for name in names}
    fields |= {"original": original, "family": family, "wrapper": wrapper}
    mixin: Any
    if ending == "Attention":
        mixin = PatchedAttention
    elif ending == family.layout.layer:
        mixin = PatchedLayer
    elif ending == family.probe:
        mixin = PatchedProbe
    elif wrapper is None:
        mixin = PatchedEncoder if family.probe is None else PatchedProbeEncoder
        fields["forward"] = encoder_forward(original)
    elif wrapper.mean:
        output = getattr(sys.modules[original.__module__], "ImageClassifierOutput")  # noqa: B009  (not ours to import)
        mixin, fields["forward"] = PatchedMeanClassifier, classifier_forward(original, output)
    else:
        mixin = PatchedWrapper
    return type(original.__name__, (SameName, mixin, original), fields)


def _family(kind: type) -> Family | None:
    """Return the family of a class, patched or not; None if it is unknown."""
    folder = FOLDER.match(kind.__module__)
    return None if folder is None else FAMILIES.get(folder[1])


def _wrapper(kind: type) -> Wrapper | None:
    """Return the entry of a class, patched or not, if it is a model around an encoder."""
    family = _family(kind)
    return None if family is None else family.wrappers.get(kind.__name__.removeprefix(family.stem))


def _is_own(kind: type) -> bool:
    """Return whether its module has the class under its name: it is neither a subclass nor patched."""
    return getattr(sys.modules[kind.__module__], kind.__name__, None) is kind


def _is(part: Any, family: Family, ending: str) -> bool:
    kind = type(part)
    return _family(kind) is family and kind.__name__ == family.stem + ending and _is_own(kind)
