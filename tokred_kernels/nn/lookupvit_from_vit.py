# SPDX-License-Identifier: MIT
"""Which timm VisionTransformers a LookupViT can be built from, and the weights that it takes."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

OP = "nn.LookupViT.from_vit"


def vit_settings(model: Any) -> dict[str, Any]:
    """Return the settings of the LookupViT that corresponds to a VisionTransformer."""
    block, embed = model.blocks[0], model.patch_embed
    return {
        "img_size": embed.img_size,
        "patch_size": embed.patch_size,
        "in_chans": embed.proj.in_channels,
        "num_classes": model.num_classes,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        # New branches end in zeros already: a small factor as well would keep them there.
        "init_values": None if isinstance(block.ls1, nn.Identity) else 1.0,
        "norm_eps": block.norm1.eps,
        "dynamic_img_size": model.dynamic_img_size,
    }


def vit_weights(model: Any) -> dict[str, Tensor]:
    """Return the tensors that a LookupViT takes from a ViT, under the names of the LookupViT's parameters."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    given = {"pos_embed": model.pos_embed[:, prefix:]}
    _add(given, "patch_embed.proj", model.patch_embed.proj)
    for index, block in enumerate(model.blocks):
        name = f"blocks.{index}"
        for part in ("norm1", "attn.qkv", "attn.proj", "ls1", "norm2", "mlp.fc1", "mlp.fc2", "ls2"):
            _add(given, f"{name}.{part}", block.get_submodule(part))
        for ours, theirs in (("norm_p", block.norm1), ("norm_l", block.norm1), ("proj", block.attn.proj)):
            _add(given, f"{name}.gather.{ours}", theirs)
        _add(given, f"{name}.ls_gather", block.ls1)
        for kind, value in block.attn.qkv.named_parameters():
            query, keys_values = value.tensor_split([len(value) // 3])
            given[f"{name}.gather.q.{kind}"], given[f"{name}.gather.kv.{kind}"] = query, keys_values
    norm = model.norm if isinstance(model.norm, nn.LayerNorm) else model.fc_norm
    for ours, theirs in (("norm", norm), ("head", model.head)):
        _add(given, ours, theirs)
        _add(given, f"{ours}_lookup", theirs)
    return given


def _add(given: dict[str, Tensor], name: str, module: nn.Module) -> None:
    given.update({f"{name}.{kind}": value for kind, value in module.named_parameters()})


def zero_new_branches(block: Any) -> None:
    """Set the last layer of each new branch of a LookupViTBlock to zero."""
    scatter = block.scatter
    last = scatter.v if isinstance(scatter.proj, nn.Identity) else scatter.proj
    for layer in (last, block.mlp_lookup.fc2):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def check_vit(model: Any) -> None:
    """Raise unless a LookupViT can be built from the model.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model is patched.
        NotImplementedError: the model, or a part of it, has no counterpart in a LookupViT.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"tokred_kernels.{OP}: vit must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "tokred_patch"):
        raise ValueError(
            f"tokred_kernels.{OP}: vit is already patched ({model.tokred_patch}); call "
            "tokred_kernels.unpatch(vit) first"
        )
    if "timm" not in sys.modules:
        raise _unsupported(f"a {type(model).__module__}.{type(model).__name__}")
    from timm.layers import Mlp, PatchEmbed  # noqa: PLC0415  (optional)
    from timm.models.vision_transformer import Attention, Block, VisionTransformer  # noqa: PLC0415

    if type(model) is not VisionTransformer:
        raise _unsupported(f"a {type(model).__module__}.{type(model).__name__}")
    embed = model.patch_embed
    found: dict[str, bool] = {
        "register tokens": model.num_reg_tokens > 0,
        "no learned positions": model.pos_embed is None,
        "a patch embedding that is not a plain convolution": type(embed) is not PatchEmbed
        or not isinstance(embed.norm, nn.Identity)
        or embed.proj.bias is None,
        "a norm before its blocks": not isinstance(model.norm_pre, nn.Identity),
        "attention pooling": model.attn_pool is not None,
        "no layer norm after its blocks": not any(isinstance(n, nn.LayerNorm) for n in (model.norm, model.fc_norm)),
    }
    for index, block in enumerate(model.blocks):
        attention: Any = getattr(block, "attn", None)
        mlp: Any = getattr(block, "mlp", None)
        found[f"attention or norms in blocks.{index} that are not a plain ViT's"] = (
            type(block) is not Block
            or type(attention) is not Attention
            or any(not isinstance(part, nn.Identity) for part in (attention.q_norm, attention.k_norm, attention.norm))
            or getattr(attention, "gate", None) is not None  # older timm has none
            or attention.proj.in_features != model.embed_dim
            or attention.proj.bias is None
            or not all(isinstance(part, nn.LayerNorm) for part in (block.norm1, block.norm2))
        )
        found[f"an MLP in blocks.{index} that is not a plain ViT's"] = (
            type(mlp) is not Mlp
            or not isinstance(mlp.norm, nn.Identity)
            or mlp.fc1.bias is None
            or type(mlp.act) is not nn.GELU
            or mlp.act.approximate != "none"
        )
    for what, there in found.items():
        if there:
            raise _unsupported(what)


def _unsupported(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"tokred_kernels.{OP}: a LookupViT has no counterpart for {what}; give a timm VisionTransformer of plain "
        "blocks with learned positions. You can also make a tokred_kernels.nn.LookupViT, and load the matching weights"
    )
