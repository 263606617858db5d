# SPDX-License-Identifier: MIT
"""The class and attribute names of the vision transformers of Hugging Face's transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Layout:
    """The names that families of the same structure use.

    Attributes:
        encoder, layer: the ends of the class names; the class names of attention end in "Attention".
        layers: the encoder's attribute for its layers.
        attention, norms, scales, drop: the attributes of a layer; None if it has no such part. Both branches share
            `drop`.
        out, dropout: the attributes of attention for its last linear layer, and for the dropout of its weights.
    """

    encoder: str
    layer: str
    layers: str
    attention: str
    norms: tuple[str, str]
    scales: tuple[str | None, str | None]
    drop: str | None
    out: str
    dropout: str


VIT = Layout(
    encoder="Model",
    layer="Layer",
    layers="layers",
    attention="attention",
    norms=("layernorm_before", "layernorm_after"),
    scales=(None, None),
    drop="dropout",
    out="o_proj",
    dropout="attention_dropout",
)
DINO_2 = Layout(
    encoder="Model",
    layer="Layer",
    layers="encoder.layer",
    attention="attention",
    norms=("norm1", "norm2"),
    scales=("layer_scale1", "layer_scale2"),
    drop="drop_path",
    out="o_proj",
    dropout="attention_dropout",
)
DINO_3 = replace(DINO_2, layers="model.layer", dropout="dropout")
CLIP = Layout(
    encoder="VisionModel",
    layer="EncoderLayer",
    layers="encoder.layers",
    attention="self_attn",
    norms=("layer_norm1", "layer_norm2"),
    scales=(None, None),
    drop=None,
    out="out_proj",
    dropout="dropout",
)


class Wrapper(NamedTuple):
    """A model around an encoder.

    Attributes:
        encoder: its attribute for the encoder.
        mean: whether it uses the mean of the patches.
        class_token: whether it uses the class token together with that mean.
        loss_takes_all: whether its loss gets the keyword arguments of the encoder.
    """

    encoder: str
    mean: bool = False
    class_token: bool = False
    loss_takes_all: bool = True


@dataclass(frozen=True)
class Family:
    """The models of one folder of transformers.

    Attributes:
        stem: the start of their class names.
        layout: the names of their parts.
        wrappers: models around the encoder, by the end of their class names.
        leading: how many tokens come before the patches, without registers; the first is a class token.
        probe: the end of the class name of the encoder's head if it pools by attention.
    """

    stem: str
    layout: Layout
    wrappers: dict[str, Wrapper]
    leading: int = 1
    probe: str | None = None

    def num_prefix(self, config: Any) -> int:
        """Return how many tokens come before the patches of an encoder with this configuration."""
        return self.leading + getattr(config, "num_register_tokens", 0)


CLASSIFIER = "ForImageClassification"
_TWO_TOWERS = {"Model": Wrapper("vision_model"), "VisionModelWithProjection": Wrapper("vision_model")}
_CLIPS = _TWO_TOWERS | {CLASSIFIER: Wrapper("vision_model", mean=True, loss_takes_all=False)}

# By the folder in transformers.models.
FAMILIES = {
    "vit": Family("ViT", VIT, {CLASSIFIER: Wrapper("vit")}),
    "deit": Family("DeiT", VIT, {CLASSIFIER: Wrapper("deit"), f"{CLASSIFIER}WithTeacher": Wrapper("deit")}, leading=2),
    "vit_msn": Family("ViTMSN", VIT, {CLASSIFIER: Wrapper("vit")}),
    "ijepa": Family("IJepa", VIT, {CLASSIFIER: Wrapper("ijepa", mean=True)}, leading=0),
    "dinov2": Family("Dinov2", DINO_2, {CLASSIFIER: Wrapper("dinov2", mean=True, class_token=True)}),
    "dinov2_with_registers": Family(
        "Dinov2WithRegisters", DINO_2, {CLASSIFIER: Wrapper("dinov2_with_registers", mean=True, class_token=True)}
    ),
    "dinov3_vit": Family("DINOv3ViT", DINO_3, {}),
    "clip": Family("CLIP", CLIP, _CLIPS),
    "metaclip_2": Family("MetaClip2", CLIP, _CLIPS),
    "siglip": Family("Siglip", CLIP, _CLIPS, leading=0, probe="MultiheadAttentionPoolingHead"),
}
