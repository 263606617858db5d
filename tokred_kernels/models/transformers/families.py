# SPDX-License-Identifier: MIT
"""What the vision transformers of Hugging Face's transformers call their classes and parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Layout:
    """What families that are made alike call their parts.

    Attributes:
        encoder, layer: how the names of the classes end; those of attention end in "Attention".
        layers: where the encoder has its layers.
        attention, norms, scales, drop: parts of a layer; None where it has none. The one for drop stands for both.
        out, dropout: the last linear layer of attention, and the probability that its weights are dropped.
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


class Around(NamedTuple):
    """A model around an encoder.

    Attributes:
        encoder: where it has that.
        mean: whether it takes the mean of the patches, besides or instead of what the encoder pooled.
        class_token: whether the class token comes before that mean.
        loss_takes_all: whether its loss gets the keywords that the encoder gets.
    """

    encoder: str
    mean: bool = False
    class_token: bool = False
    loss_takes_all: bool = True


@dataclass(frozen=True)
class Family:
    """The models of one folder of transformers.

    Attributes:
        stem: how the names of their classes begin.
        layout: of their parts.
        around: models around the encoder, by the end of their names.
        leading: how many tokens come before the patches, registers not counted; the first is a class token.
        probe: the end of the name of the encoder's head, where that pools by attention.
    """

    stem: str
    layout: Layout
    around: dict[str, Around]
    leading: int = 1
    probe: str | None = None

    def num_prefix(self, config: Any) -> int:
        """How many tokens come before the patches of an encoder with this configuration."""
        return self.leading + getattr(config, "num_register_tokens", 0)


CLASSIFIER = "ForImageClassification"
_TWO_TOWERS = {"Model": Around("vision_model"), "VisionModelWithProjection": Around("vision_model")}
_CLIPS = _TWO_TOWERS | {CLASSIFIER: Around("vision_model", mean=True, loss_takes_all=False)}

# By the folder in transformers.models.
FAMILIES = {
    "vit": Family("ViT", VIT, {CLASSIFIER: Around("vit")}),
    "deit": Family("DeiT", VIT, {CLASSIFIER: Around("deit"), f"{CLASSIFIER}WithTeacher": Around("deit")}, leading=2),
    "vit_msn": Family("ViTMSN", VIT, {CLASSIFIER: Around("vit")}),
    "ijepa": Family("IJepa", VIT, {CLASSIFIER: Around("ijepa", mean=True)}, leading=0),
    "dinov2": Family("Dinov2", DINO_2, {CLASSIFIER: Around("dinov2", mean=True, class_token=True)}),
    "dinov2_with_registers": Family(
        "Dinov2WithRegisters", DINO_2, {CLASSIFIER: Around("dinov2_with_registers", mean=True, class_token=True)}
    ),
    "dinov3_vit": Family("DINOv3ViT", DINO_3, {}),
    "clip": Family("CLIP", CLIP, _CLIPS),
    "metaclip_2": Family("MetaClip2", CLIP, _CLIPS),
    "siglip": Family("Siglip", CLIP, _CLIPS, leading=0, probe="MultiheadAttentionPoolingHead"),
}
