# SPDX-License-Identifier: MIT
"""A LookupViT made of a timm VisionTransformer's weights, for fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokred_kernels.models import base as models
from tokred_kernels.models.imports import import_timm
from tokred_kernels.nn.lookupvit import LookupViT

import_timm()

from timm.layers import Mlp, PatchEmbed  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

LOGGER = logging.getLogger("tokred_kernels")


def apply(
    model: Any,
    *,
    grid: Sequence[int],
    grids: Sequence[Sequence[int]] | None = None,
    lookup_ratio: float = 2.0,
    scatter_proj: bool = False,
    drop_path_rate: float = 0.0,
    proj_drop: float = 0.0,
    attn_drop: float = 0.0,
) -> LookupViT:
    """A new `nn.LookupViT` that starts from the ViT's weights; the given model stays as it is.

    Args:
        model: a VisionTransformer of timm's own blocks, with learned positions, without distillation and register
            tokens.
        grid: the compressed grid; this and what follows are of `nn.LookupViT`. All else is the model's, its dropout
            rates not among it.
        grids: compressed grids to draw from when training; None for `grid` alone.
        lookup_ratio: by how much the MLP on lookup tokens is narrower than they are.
        scatter_proj: whether what is scattered is projected once more.
        drop_path_rate: of the last block.
        proj_drop: of projections and MLPs.
        attn_drop: of the compressed tokens' self attention.

    Returns:
        The LookupViT, on the model's device, in its dtype and mode. `taken` and `fresh` are the names of its parameters
        that came from the ViT, and of those that did not: together all of them. The logger "tokred_kernels" has both
        counts.

    What is taken: the patch embedding; the positions, without those of the class token; of each block the norms, self
    attention, MLP and layer scale, which become the compressed path, and its attention once more, with norm and layer
    scale, for the gather; the last norm, and the head, once for each kind of token. A head that was trained on a class
    token gets a mean instead: that, too, is for fine-tuning.

    What is new: the values that are scattered, and the MLP on lookup tokens. The last layer of each starts at zero, so
    that lookup tokens are at first what they were embedded as: what the ViT's weights never saw is added as it is
    learned. A gather with the ViT's projection learns faster than one that starts at zero too, and all of it than a
    LookupViT of random weights.

    Raises:
        NotImplementedError: a model, or a part of it, that a LookupViT has no place for.
        TypeError, ValueError: a wrong setting, as of `nn.LookupViT`.
    """
    models.check_switches(scatter_proj=scatter_proj)
    models.examine(model)
    _check(model)
    block, embed = model.blocks[0], model.patch_embed
    built: Any = LookupViT(
        embed.img_size,
        embed.patch_size,
        embed.proj.in_channels,
        model.num_classes,
        model.embed_dim,
        len(model.blocks),
        block.attn.num_heads,
        grid=grid,
        grids=grids,
        mlp_ratio=block.mlp.fc1.out_features / model.embed_dim,
        lookup_ratio=lookup_ratio,
        qkv_bias=block.attn.qkv.bias is not None,
        scatter_proj=scatter_proj,
        drop_path_rate=drop_path_rate,
        # New branches end in zeros already: a small factor as well would keep them there.
        init_values=None if isinstance(block.ls1, nn.Identity) else 1.0,
        proj_drop=proj_drop,
        attn_drop=attn_drop,
        norm_eps=block.norm1.eps,
        dynamic_img_size=model.dynamic_img_size,
    )
    built.to(device=model.pos_embed.device, dtype=model.pos_embed.dtype).train(model.training)
    given = _weights_of(model)
    parameters = dict(built.named_parameters())
    with torch.no_grad():
        for name, value in given.items():
            parameters[name].copy_(value)
        for new in built.blocks:
            _silence(new)
    built.taken = tuple(name for name in parameters if name in given)
    built.fresh = tuple(name for name in parameters if name not in given)
    LOGGER.info(
        "tokred_kernels.patch: this LookupViT took %d parameters from the %s, and has %d new ones (see model.taken and "
        "model.fresh)",
        len(built.taken),
        type(model).__name__,
        len(built.fresh),
    )
    return built


def _weights_of(model: Any) -> dict[str, Tensor]:
    """What the ViT has for the LookupViT's parameters, by their names."""
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


def _silence(block: Any) -> None:
    """Start the last layer of each new branch at zero."""
    scatter = block.scatter
    last = scatter.v if isinstance(scatter.proj, nn.Identity) else scatter.proj
    for layer in (last, block.mlp_lookup.fc2):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def _check(model: Any) -> None:
    """Raise NotImplementedError for what a LookupViT has no place for."""
    if type(model) is VisionTransformerDistilled:
        raise _refuse(f"the distillation token of a {type(model).__name__}")
    if type(model) is not VisionTransformer:
        raise _refuse(f"the blocks of a {type(model).__name__}")
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
        attention: Any = block.attn
        mlp: Any = block.mlp
        unlike = (
            any(not isinstance(part, nn.Identity) for part in (attention.q_norm, attention.k_norm, attention.norm))
            or getattr(attention, "gate", None) is not None  # older timm has none
            or attention.proj.in_features != model.embed_dim
            or attention.proj.bias is None
            or not all(isinstance(part, nn.LayerNorm) for part in (block.norm1, block.norm2))
        )
        found[f"attention or norms in blocks.{index} that are not a plain ViT's"] = unlike
        plain = type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity) and mlp.fc1.bias is not None
        found[f"an MLP in blocks.{index} that is not a plain ViT's"] = not (
            plain and type(mlp.act) is nn.GELU and mlp.act.approximate == "none"
        )
    for what, there in found.items():
        if there:
            raise _refuse(what)


def _refuse(what: str) -> NotImplementedError:
    return NotImplementedError(
        f'tokred_kernels.patch: "lookupvit" has no place for {what}; it is built from a VisionTransformer of plain '
        "blocks with learned positions. You can make a tokred_kernels.nn.LookupViT, and load what corresponds"
    )
