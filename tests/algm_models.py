# SPDX-License-Identifier: MIT
"""Tiny models and images on which ALGM merges some tokens and not others, whatever the weights drawn."""

import torch
from torch import nn
from written_out import load_dense

from tokred_kernels.models.imports import import_timm

dense_algm = load_dense("algm")

timm = import_timm()
vit = timm.models.vision_transformer
VisionTransformer = vit.VisionTransformer
VisionTransformerDistilled = timm.models.deit.VisionTransformerDistilled

# 36 patches: even with no prefix, odd with a class token; head width 16.
TINY = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
GRID = (6, 6)
MODELS = {
    "vit": (VisionTransformer, {}),
    "distilled": (VisionTransformerDistilled, {}),
    "registers": (VisionTransformer, {"reg_tokens": 4}),
    "no prefix": (VisionTransformer, {"class_token": False, "global_pool": "avg"}),
    "q and k norm, layer scale": (VisionTransformer, {"qk_norm": True, "init_values": 0.5, "scale_attn_norm": True}),
    "swiglu, pre norm": (VisionTransformer, {"mlp_layer": timm.layers.SwiGLUPacked, "pre_norm": True}),
}
COUNTS = {"batch": "batch", "image": "image", "fixed": [3, 4]}


def make(name="vit", **more):
    kind, settings = MODELS[name]
    model = kind(**{**TINY, **settings, **more}).eval()
    for parameter in model.parameters():  # timm's initial biases and tokens are zero or tiny, and would test nothing
        nn.init.normal_(parameter, std=0.2)
    return model


def images(batch=3, size=(48, 48)):
    """Noise on a slope that gets steeper from image to image, so that neighbors get more similar."""
    slope = torch.linspace(-1, 1, size[1]) * torch.linspace(0, 1, max(batch, 2))[:batch, None, None, None]
    return torch.randn(batch, 3, *size) + slope


def threshold_for(model, x, merged=3, layer=0, window=(2, 2)):
    """The threshold by which `merged` windows merge in the image that has the fewest."""
    seen = []
    hook = model.blocks[layer].norm2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    found = [dense_algm.window_similarities(one, GRID, window, model.num_prefix_tokens) for one in seen[0]]
    ordered = [sorted((value for value, _ in windows), reverse=True) for windows in found]
    fewest = min(ordered, key=lambda values: values[merged - 1])
    return sum(fewest[merged - 1 : merged + 1]) / 2


def some(model, x, **more):
    """Settings by which some windows of x merge, more in one image than in another."""
    return {"layers": (0, 2), "threshold": threshold_for(model, x), **more}
