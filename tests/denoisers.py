# SPDX-License-Identifier: MIT
"""Small denoisers of diffusers' own classes, with random weights that matter, and what they take."""

import torch

from tokred_kernels.methods import tomesd
from tokred_kernels.models.imports import import_diffusers
from tokred_kernels.patching import patch

diffusers = import_diffusers()

UNET = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
}
DIT = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2, "sample_size": 16, "norm_num_groups": 4}
PIXART = {
    **DIT,
    "cross_attention_dim": 24,
    "caption_channels": 12,
    "out_channels": 4,
    "use_additional_conditions": False,
}
MODELS = {
    "unet": (diffusers.UNet2DConditionModel, UNET),
    "dit": (diffusers.DiTTransformer2DModel, DIT),
    "pixart": (diffusers.PixArtTransformer2DModel, PIXART),
}
ALL = {"merge_attn": True, "merge_crossattn": True, "merge_mlp": True}
PARTS = {"merge_attn": "attn1", "merge_crossattn": "attn2", "merge_mlp": "ff"}


def make(name="unet", **more):
    kind, settings = MODELS[name]
    model = kind(**{**settings, **more}).eval()
    with torch.no_grad():  # blocks must change the residual stream visibly, and gates must not be zero
        for key, parameter in model.named_parameters():
            if "transformer_blocks" in key or "adaln" in key:
                parameter.copy_(
                    torch.randn_like(parameter) * (0.5 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
                )
    return model


def inputs(name="unet", batch=2, size=(16, 16), dtype=torch.float32):
    """The arguments of a model of that name, made anew from a seed."""
    draw = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, 4, *size, generator=draw).to(dtype)
    steps = torch.arange(1, batch + 1) * 7
    context = torch.randn(batch, 5, 12 if name == "pixart" else 16, generator=draw).to(dtype)
    if name == "unet":
        return {"sample": latent, "timestep": steps, "encoder_hidden_states": context}
    more = {"class_labels": steps} if name == "dit" else {"encoder_hidden_states": context}
    return {"hidden_states": latent, "timestep": steps, **more}


def run(model, arguments):
    return model(**arguments).sample


def patched(model, **settings):
    return patch(model, "tomesd", **settings)


def record_matches(monkeypatch):
    """A list that fills with the arguments and the map of each match."""
    seen = []

    def record(metric, r, geometry, drawn):
        token_map = plain(metric, r, geometry, drawn)
        more = {"grid": geometry[:2], "drawn": drawn, "dest": token_map.dest.clone()}
        seen.append({"metric": metric.detach().clone(), "r": r, **more})
        return token_map

    plain = tomesd.match_cells
    monkeypatch.setattr(tomesd, "match_cells", record)
    return seen
