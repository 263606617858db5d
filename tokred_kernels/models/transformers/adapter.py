# SPDX-License-Identifier: MIT
"""Which of transformers' models can be patched; `models.py` says what an adapter has.

Classes are looked up beside the model's own, so that nothing of transformers is imported here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

from torch import nn

from tokred_kernels.models.base import OWN_BLOCK, SUPPORTED, ModelSpec, Parts
from tokred_kernels.models.imports import check_version
from tokred_kernels.models.patched import RECORD, STEP, Mark, Patched
from tokred_kernels.models.replaced import refuse_replaced
from tokred_kernels.models.state import Record, Step
from tokred_kernels.models.transformers.families import FAMILIES, Around, Family
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
from tokred_kernels.patching import MARK

OLDEST = (5, 18)
FOLDER = re.compile(r"transformers\.models\.(\w+)\.")


def supports(model: Any) -> bool:
    """Whether `model`, not patched, is of a class that can be."""
    family, around = _family(type(model)), _around(type(model))
    if isinstance(model, PatchedWrapper):
        return not isinstance(encoder_of(model), Patched)  # it was unpatched by itself, and left its wrapper alone
    if family is None or not _is_own(type(model)):
        return False
    return around is not None or _is(model, family, family.layout.encoder)


def check(model: Any) -> None:
    """Raise unless the version of transformers, and all parts, are what this adapter was written for."""
    check_version(sys.modules["transformers"], OLDEST)
    encoder = encoder_of(model)
    if isinstance(encoder, Patched):
        raise ValueError(
            f"tokred_kernels.patch: the {type(encoder).__name__} inside is already patched ({getattr(encoder, MARK)}); "
            "call tokred_kernels.unpatch on it first, then patch it anew"
        )
    check_attention(encoder.config)
    family: Any = _family(type(model))
    layout = family.layout
    if not _is(encoder, family, layout.encoder):
        raise NotImplementedError(
            f"tokred_kernels.patch: this {type(model).__name__} has a {type(encoder).__module__}."
            f"{type(encoder).__name__} for its encoder, which is not supported; {SUPPORTED['transformers']} are"
        )
    layers = encoder.get_submodule(layout.layers)
    for index, layer in enumerate(layers):
        parts = ((layer, layout.layer), (getattr(layer, layout.attention, None), "Attention"))
        for part, name in parts:
            if not _is(part, family, name):
                raise NotImplementedError(
                    f"tokred_kernels.patch: layer {index} of this {type(encoder).__name__} has a "
                    f"{type(part).__module__}.{type(part).__name__} for its {family.stem}{name}, which is not "
                    f"supported; {SUPPORTED['transformers']} are. You can {OWN_BLOCK}"
                )
    head = has_probe(encoder)
    if head and not _is(encoder.head, family, family.probe):
        raise NotImplementedError(
            f"tokred_kernels.patch: the head of this {type(encoder).__name__} is a {type(encoder.head).__module__}."
            f"{type(encoder.head).__name__}, which may pool tokens without heeding what they stand for; supported are "
            f"{family.stem}{family.probe} and torch.nn.Identity"
        )
    ours = [encoder, layers[0], getattr(layers[0], layout.attention)] if layers else [encoder]
    ours += [encoder.head] if head else []
    ours += [model] if model is not encoder and _around(type(model)).mean else []  # type: ignore[union-attr]
    refuse_replaced(model, tuple(map(type, ours)), "patch the model first, and put those on after")


def anatomy(model: Any) -> ModelSpec:
    """See `models.anatomy`."""
    encoder = encoder_of(model)
    family: Any = _family(type(encoder))
    layers, config, head = encoder.get_submodule(family.layout.layers), encoder.config, has_probe(encoder)
    return ModelSpec(
        encoder,
        layers,
        tuple(_parts(layer, getattr(layer, family.layout.attention), config) for layer in layers),
        prod(grid_of(config, sides(config.image_size))),
        family.num_prefix(config),
        class_token=family.leading > 0,
        width=config.hidden_size,
        grid=None,
        gridless=None,
        packs=False,
        pool="attention" if head else "the class token, or a mean",
        heeds_policy=not head,
    )


def _parts(layer: Any, attention: Any, config: Any) -> Parts:
    inner = config.num_attention_heads * attention.head_dim
    return Parts(attention, layer.mlp, config.hidden_size, inner, attention.head_dim)


def has_probe(encoder: Any) -> bool:
    """Whether its head pools by attention; patched, it says that it has none."""
    family: Any = _family(type(encoder))
    return family.probe is not None and encoder.__dict__["use_head"] and type(encoder.head) is not nn.Identity


def install(model: Any, mark: Mark, steps: Callable[[int], Step]) -> None:
    """See `models.install`."""
    encoder = encoder_of(model)
    family: Any = _family(type(encoder))
    for index, layer in enumerate(encoder.get_submodule(family.layout.layers)):
        _disguise(getattr(layer, family.layout.attention))
        _disguise(layer)
        setattr(layer, STEP, steps(index))
    if has_probe(encoder):
        _disguise(encoder.head)
    setattr(encoder, MARK, mark)
    setattr(encoder, RECORD, Record())
    _disguise(encoder)
    if model is not encoder:
        _disguise(model)


def encoder_of(model: Any) -> Any:
    """What runs the layers of a model, patched or not, and carries its mark."""
    around = _around(type(model))
    return model if around is None else getattr(model, around.encoder)


class Disguised:
    """A patched class that goes by the name of the original.

    transformers asks by names: what a model can record, which modules a device or a process gets whole, what
    `save_pretrained` writes into the configuration.
    """

    original: Any

    def _get_name(self) -> str:
        return f"Patched{self.original.__name__}"  # as it is printed

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles: by its name the original class would be found."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _bare, (self.original,), *reduced[2:]


def _disguise(module: Any) -> None:
    kind: Any = type(module)
    if not isinstance(module, Patched):
        module.__class__ = patched_class(kind)


def _bare(original: Any) -> Any:
    kind = patched_class(original)
    return kind.__new__(kind)


@cache
def patched_class(original: Any) -> Any:
    """The class that a module of `original` takes while it is patched."""
    family: Any = _family(original)
    around, ending = _around(original), original.__name__.removeprefix(family.stem)
    names = ("__module__", "__qualname__", "__doc__")
    fields = {name: getattr(original, name) for name in names}
    fields |= {"original": original, "family": family, "around": around}
    mixin: Any
    if ending == "Attention":
        mixin = PatchedAttention
    elif ending == family.layout.layer:
        mixin = PatchedLayer
    elif ending == family.probe:
        mixin = PatchedProbe
    elif around is None:
        mixin = PatchedEncoder if family.probe is None else PatchedProbeEncoder
        fields["forward"] = encoder_forward(original)
    elif around.mean:
        output = getattr(sys.modules[original.__module__], "ImageClassifierOutput")  # noqa: B009  (not ours to import)
        mixin, fields["forward"] = PatchedMeanClassifier, classifier_forward(original, output)
    else:
        mixin = PatchedWrapper
    return type(original.__name__, (Disguised, mixin, original), fields)


def _family(kind: type) -> Family | None:
    """That of a class, patched or not."""
    folder = FOLDER.match(kind.__module__)
    return None if folder is None else FAMILIES.get(folder[1])


def _around(kind: type) -> Around | None:
    """What is known of a class, patched or not, as a model around an encoder."""
    family = _family(kind)
    return None if family is None else family.around.get(kind.__name__.removeprefix(family.stem))


def _is_own(kind: type) -> bool:
    """Whether a class is what its module has by its name: neither derived from that, nor patched."""
    return getattr(sys.modules[kind.__module__], kind.__name__, None) is kind


def _is(part: Any, family: Family, ending: str) -> bool:
    kind = type(part)
    return _family(kind) is family and kind.__name__ == family.stem + ending and _is_own(kind)
