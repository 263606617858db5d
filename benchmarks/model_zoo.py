# SPDX-License-Identifier: MIT
"""The models of the model suite: timm's by their names, and, after "transformers/", those of Hugging Face's.

Their weights are random: none are fetched, and times do not depend on them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokred_kernels.models.imports import import_timm, import_with_torchvision

TRANSFORMERS = "transformers/"
# The classes of model and configuration, and how the published one differs from the configuration's defaults; images
# are of 224 pixels.
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 224}
OTHERS = {
    "dinov2-small": ("Dinov2Model", "Dinov2Config", SMALL),
    "siglip-base-patch16-224": ("SiglipVisionModel", "SiglipVisionConfig", {}),
}


def make_model(name: str) -> nn.Module:
    """The model of a case, in eval mode."""
    if not name.startswith(TRANSFORMERS):
        return import_timm().create_model(name).eval()
    library: Any = import_with_torchvision("transformers")
    kind, config, settings = OTHERS[name.removeprefix(TRANSFORMERS)]
    return getattr(library, kind)(getattr(library, config)(**settings)).eval()


def output_of(model: nn.Module, images: Tensor) -> Tensor:
    """What the model makes of images: the vector that it pools, or its logits."""
    given = model(images)
    return given if isinstance(given, Tensor) else given.pooler_output
