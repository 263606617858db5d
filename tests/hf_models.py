# SPDX-License-Identifier: MIT
"""Tiny models of Hugging Face's transformers, and timm's of the same weights."""

import torch
from torch import nn

from tokred_kernels.models.imports import import_timm, import_with_torchvision

transformers = import_with_torchvision("transformers")

# 36 patches; head width 16.
SIDE, PATCH, DEPTH = 48, 8, 4
TINY = {
    "hidden_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": SIDE,
    "patch_size": PATCH,
}
LABELS = {"num_labels": 5}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOWERS = {"vision_config": TINY, "text_config": TEXT, "projection_dim": 16}
BY_RATIO = {name: value for name, value in TINY.items() if name != "intermediate_size"}
# The class, the configuration's, and what that is given.
MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", TINY | LABELS),
    "vit, encoder": ("ViTModel", "ViTConfig", TINY),
    "deit": ("DeiTForImageClassification", "DeiTConfig", TINY | LABELS),
    "deit, distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", TINY | LABELS),
    "vit_msn": ("ViTMSNForImageClassification", "ViTMSNConfig", TINY | LABELS),
    "ijepa": ("IJepaForImageClassification", "IJepaConfig", TINY | LABELS),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", BY_RATIO | LABELS | {"use_swiglu_ffn": True}),
    "dinov2, registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", BY_RATIO | LABELS),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", TINY | {"num_register_tokens": 4, "layerscale_value": 0.5}),
    "clip, encoder": ("CLIPVisionModel", "CLIPVisionConfig", TINY),
    "clip, projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", TINY),
    "clip, classifier": ("CLIPForImageClassification", "CLIPConfig", TOWERS | LABELS),
    "metaclip_2": ("MetaClip2ForImageClassification", "MetaClip2Config", TOWERS | LABELS),
    "siglip": ("SiglipForImageClassification", "SiglipConfig", TOWERS | LABELS),
    "siglip, encoder": ("SiglipVisionModel", "SiglipVisionConfig", TINY),
}


def make(name="vit", **more):
    """In eval mode, with weights that are large enough to separate tokens."""
    kind, config, settings = MODELS[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings | more)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def images(batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, SIDE, SIDE, dtype=dtype)


def result(outputs):
    """The first thing that a model gives: logits, embeddings or tokens."""
    return outputs.to_tuple()[0]


# What timm calls the parts, in the order in which the names are replaced.
TIMM_NAMES = {
    "vit": {
        "vit.embeddings.cls_token": "cls_token",
        "vit.embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "vit.layers": "blocks",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "attention.": "attn.",
        "vit.layernorm": "norm",
        "classifier": "head",
    },
    "dinov3": {
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "reg_token",
        "embeddings.patch_embeddings": "patch_embed.proj",
        "model.layer": "blocks",
        "layer_scale1.lambda1": "gamma_1",
        "layer_scale2.lambda1": "gamma_2",
        "attention.o_proj": "attn.proj",
        "attention.": "attn.",
        "up_proj": "fc1",
        "down_proj": "fc2",
    },
    "siglip, encoder": {
        "embeddings.patch_embedding": "patch_embed.proj",
        "embeddings.position_embedding.weight": "pos_embed",
        "encoder.layers": "blocks",
        "layer_norm": "norm",
        "self_attn.out_proj": "attn.proj",
        "self_attn": "attn",
        "post_layernorm": "norm",
        "head.probe": "attn_pool.latent",
        "head.attention.out_proj": "attn_pool.proj",
        "head.layernorm": "attn_pool.norm",
        "head.mlp": "attn_pool.mlp",
    },
}
SIZES = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 48, "depth": DEPTH, "num_heads": 3, "mlp_ratio": 2}
ROTARY = {
    "use_abs_pos_emb": False,
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "rope_temperature": 100.0,
}


def timm_twin(name, model):
    """A timm model that computes what `model`, one of TIMM_NAMES, does: its logits, or what it pools."""
    timm = import_timm()
    vit, eva = timm.models.vision_transformer.VisionTransformer, timm.models.eva.Eva
    if name == "vit":
        twin = vit(**SIZES, num_classes=5)
    elif name == "dinov3":
        settings = {"num_reg_tokens": 4, "init_values": 0.5, "global_pool": "token", "qkv_fused": False}
        twin = eva(**SIZES, **ROTARY, **settings, num_classes=0)
    else:
        twin = vit(**SIZES, class_token=False, global_pool="map", num_classes=0, act_layer="gelu_tanh")
    state = {}
    for theirs, value in model.state_dict().items():
        key = theirs
        for part, ours in TIMM_NAMES[name].items():
            key = key.replace(part, ours)
        state[key] = value
    if name == "siglip, encoder":
        state["pos_embed"] = state["pos_embed"][None]
        for part in ("weight", "bias"):
            q, k, v = state.pop(f"head.attention.in_proj_{part}").chunk(3)
            state |= {f"attn_pool.q.{part}": q, f"attn_pool.kv.{part}": torch.cat([k, v])}
    for key in twin.state_dict():
        if "attn.qkv" in key:
            state[key] = torch.cat([state.pop(key.replace("qkv", f"{part}_proj")) for part in "qkv"])
    state.pop("embeddings.mask_token", None)
    twin.load_state_dict(state)
    for module in twin.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = model.config.layer_norm_eps
    return twin.eval()
