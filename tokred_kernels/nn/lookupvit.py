# SPDX-License-Identifier: MIT
"""LookupViT: a vision transformer that processes a small grid of compressed tokens, and looks up a large grid."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred_kernels.checks import (
    MAX_ROWS,
    WIDEST,
    check_count,
    check_dense,
    check_flag,
    check_floating,
    check_real,
    check_same_device,
    shape,
    shown,
)
from tokred_kernels.nn.lookupvit_block import (
    NORM_EPS,
    LookupViTBlock,
    check_above_zero,
    check_block,
    check_heads,
    check_probabilities,
)
from tokred_kernels.nn.lookupvit_from_vit import check_vit, vit_settings, vit_weights, zero_new_branches
from tokred_kernels.nn.lookupvit_positions import smooth_positions
from tokred_kernels.nn.lookupvit_resize import resize_tokens

OP = "nn.LookupViT"
HEAD_STD = 0.02
LOGGER = logging.getLogger("tokred_kernels")
CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


class LookupLogits(NamedTuple):
    """The logits of the two heads, (B, classes) each.

    Attributes:
        compressed: the logits of the compressed tokens.
        lookup: the logits of the lookup tokens.
    """

    compressed: Tensor
    lookup: Tensor


def lookup_loss(logits: LookupLogits, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the sum of the cross entropies of both heads.

    Args:
        logits: the output of a LookupViT in training.
        labels: (B,) classes, or (B, classes) probabilities.
        label_smoothing: see torch's `cross_entropy`.

    Raises:
        TypeError: logits that are not of both heads: in evaluation, a model returns their average.
    """
    if not isinstance(logits, LookupLogits):
        raise TypeError(
            f"tokred_kernels.nn.lookup_loss: logits must be a LookupLogits, got {type(logits).__name__}; a LookupViT "
            "returns it in training: call model.train()"
        )
    op = "nn.lookup_loss"
    for part in logits:
        check_floating(op, "logits", part)
    check_dense(op, "labels", labels)
    check_same_device(op, "labels", labels, "logits", logits.lookup)
    check_real(op, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"tokred_kernels.{op}: label_smoothing must be from 0 to 1, got {label_smoothing}")
    if logits.lookup.dim() != 2 or logits.compressed.shape != logits.lookup.shape:
        got = f"{shape(logits.compressed)} and {shape(logits.lookup)}"
        raise ValueError(f"tokred_kernels.{op}: logits must be two tensors (B, classes), got {got}")
    indices = labels.dtype in (torch.int64, torch.uint8)
    if labels.shape != (logits.lookup.shape[:1] if indices else logits.lookup.shape):
        raise ValueError(
            f"tokred_kernels.{op}: labels must be int64 (B,) or probabilities (B, classes) as the logits are "
            f"{shape(logits.lookup)}, got {labels.dtype} of shape {shape(labels)}"
        )
    compressed, lookup = (F.cross_entropy(own, labels, label_smoothing=label_smoothing) for own in logits)
    return compressed + lookup


class LookupViT(nn.Module):
    """LookupViT (Koner et al., ECCV 2024), for images and for video.

    Patches become lookup tokens with learned positions, which start as `smooth_positions`. Compressed tokens are the
    lookup tokens, resized linearly to a smaller grid, without parameters. `LookupViTBlock` processes both, and a norm
    and a head follow on the mean of each. The model has no class token.

    Args:
        img_size: pixels, (height, width), or (time, height, width) for video; one number for a square image.
        patch_size: pixels of a patch, in the same dimensions; one number for all.
        in_chans: channels of an image.
        num_classes: classes of each head; 0 for no heads, so that both outputs are the mean of their tokens, (B, D).
        embed_dim, depth, num_heads: D, the number of blocks, H.
        grid: the compressed grid, in the same dimensions, unless `forward` gets another one.
        grids: in training, `forward` draws one of these for each step, instead of `grid`.
        mlp_ratio, lookup_ratio, qkv_bias, scatter_proj, init_values, proj_drop, attn_drop, norm_eps: see
            `LookupViTBlock`.
        drop_path_rate: the rate of the last block; it grows linearly from 0 in the first block.
        dynamic_img_size: True accepts images of every size that the patch size divides, and resizes positions.

    Parameters that a ViT has too have the names and shapes of timm's VisionTransformer: `patch_embed`, `pos_embed`
    (without class token), `norm1`, `attn`, `norm2` and `mlp` of `blocks`, `norm`, `head`.

    Raises:
        TypeError, ValueError: a wrong setting; an image size that the patch size does not divide; a compressed grid
            that is larger than the lookup grid in any dimension, or of another rank; `num_heads` that do not divide
            `embed_dim`.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        *,
        grid: Sequence[int] = (7, 7),
        grids: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 4.0,
        lookup_ratio: float = 2.0,
        qkv_bias: bool = True,
        scatter_proj: bool = False,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        norm_eps: float = NORM_EPS,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        in_chans = check_count(OP, "in_chans", in_chans, least=1, most=WIDEST)
        num_classes = check_count(OP, "num_classes", num_classes, most=MAX_ROWS)
        depth = check_count(OP, "depth", depth, least=1, most=WIDEST)
        check_heads(OP, "embed_dim", embed_dim, num_heads)
        check_above_zero(OP, mlp_ratio=mlp_ratio, lookup_ratio=lookup_ratio)
        check_probabilities(OP, drop_path_rate=drop_path_rate, proj_drop=proj_drop, attn_drop=attn_drop)
        check_flag(OP, "dynamic_img_size", dynamic_img_size)
        check_block(OP, qkv_bias, scatter_proj, init_values, norm_eps)
        rank = next((len(size) for size in (img_size, patch_size) if isinstance(size, (tuple, list))), 2)
        if rank not in CONVOLUTIONS:
            raise ValueError(f"tokred_kernels.{OP}: img_size must have 2 or 3 dimensions, got {img_size}")
        self.img_size = _sizes("img_size", img_size, rank)
        self.patch_size = _sizes("patch_size", patch_size, rank)
        self.in_chans, self.num_classes, self.embed_dim = in_chans, num_classes, embed_dim
        self.dynamic_img_size = dynamic_img_size
        self.lookup_grid = self.lookup_grid_of(self.img_size)
        self.grid = self.compressed_grid(grid, self.lookup_grid)
        self.grids = None if grids is None else self._choices(grids)

        self.patch_embed = PatchEmbed(in_chans, embed_dim, self.patch_size)
        # Random positions would average out in the resizing, and make the compressed tokens too similar.
        self.pos_embed = nn.Parameter(smooth_positions(self.lookup_grid, embed_dim))
        self.blocks = nn.ModuleList(
            LookupViTBlock(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                lookup_ratio=lookup_ratio,
                qkv_bias=qkv_bias,
                scatter_proj=scatter_proj,
                drop_path=drop_path_rate * index / max(1, depth - 1),
                init_values=init_values,
                proj_drop=proj_drop,
                attn_drop=attn_drop,
                norm_eps=norm_eps,
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.norm_lookup = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.head = _head(embed_dim, num_classes)
        self.head_lookup = _head(embed_dim, num_classes)

    @classmethod
    def from_vit(
        cls,
        vit: nn.Module,
        *,
        grid: Sequence[int],
        grids: Sequence[Sequence[int]] | None = None,
        lookup_ratio: float = 2.0,
        scatter_proj: bool = False,
        drop_path_rate: float = 0.0,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
    ) -> LookupViT:
        """Make a LookupViT that starts from the weights of a timm VisionTransformer, for fine-tuning.

        These weights are copied: the patch embedding; the positions, without that of the class token; the norms, self
        attention, MLP and layer scale of each block, for the compressed tokens; its attention, norm and layer scale
        again, for the gather; the last norm and the head, for each kind of token. A head that was trained on a class
        token now gets a mean, so it needs fine-tuning too.

        The scattered values and the MLP on lookup tokens are new. The last layer of each starts at zero, so lookup
        tokens keep their embedding at first. Starting the gather from the ViT's projection learns faster than starting
        it at zero too, and both learn faster than a LookupViT with random weights.

        Args:
            vit: a VisionTransformer of timm's own blocks with learned positions, and without distillation and register
                tokens. It does not change.
            grid, grids, lookup_ratio, scatter_proj, drop_path_rate, proj_drop, attn_drop: see `LookupViT`. All other
                settings are those of the ViT; its dropout rates are not used.

        Returns:
            The LookupViT, on the device of the ViT, in its dtype and mode. `taken` and `fresh` are the names of the
            parameters that came from the ViT, and of the others. The logger "tokred_kernels" reports their numbers.

        Raises:
            NotImplementedError: a model, or a part of it, that has no counterpart in a LookupViT.
            TypeError, ValueError: a wrong setting, or a patched model.
        """
        check_vit(vit)
        source: Any = vit
        model: Any = cls(
            **vit_settings(source),
            grid=grid,
            grids=grids,
            lookup_ratio=lookup_ratio,
            scatter_proj=scatter_proj,
            drop_path_rate=drop_path_rate,
            proj_drop=proj_drop,
            attn_drop=attn_drop,
        )
        model.to(device=source.pos_embed.device, dtype=source.pos_embed.dtype).train(source.training)
        given, parameters = vit_weights(source), dict(model.named_parameters())
        with torch.no_grad():
            for name, value in given.items():
                parameters[name].copy_(value)
            for block in model.blocks:
                zero_new_branches(block)
        model.taken = tuple(name for name in parameters if name in given)
        model.fresh = tuple(name for name in parameters if name not in given)
        LOGGER.info(
            "tokred_kernels.nn.LookupViT.from_vit: took %d parameters from the %s, and %d are new (see model.taken and "
            "model.fresh)",
            len(model.taken),
            type(vit).__name__,
            len(model.fresh),
        )
        return model

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> LookupLogits | Tensor:
        """Return the logits of images (B, channels, height, width), or video (B, channels, time, height, width).

        Args:
            x: the images.
            grid: the compressed grid, at most the lookup grid. None is the model's `grid`, or, in training with
                `grids`, one drawn by `sample_grid()`.

        Returns:
            In training, the logits of both heads, for `lookup_loss`; in evaluation, their average, (B, classes).

        Raises:
            TypeError, ValueError: images or a grid that the model does not support.
        """
        z_p, z_l = self.forward_features(x, grid)
        logits = LookupLogits(self.head(z_p.mean(1)), self.head_lookup(z_l.mean(1)))
        return logits if self.training else (logits.compressed + logits.lookup) / 2

    def forward_features(self, x: Tensor, grid: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return the compressed tokens (B, M, D) and the lookup tokens (B, N, D), in row order, after the last norms.

        Arguments and errors are those of `forward`.
        """
        lookup_grid = self._grid_of_images(x)
        if grid is None:
            grid = self.sample_grid() if self.training else self.grid
        compressed_grid = self.compressed_grid(grid, lookup_grid)
        z_l = self.patch_embed(x) + resize_tokens(self.pos_embed, self.lookup_grid, lookup_grid)
        z_p = resize_tokens(z_l, lookup_grid, compressed_grid)
        for block in self.blocks:
            z_p, z_l = block(z_p, z_l)
        return self.norm(z_p), self.norm_lookup(z_l)

    def sample_grid(self, generator: torch.Generator | None = None) -> tuple[int, ...]:
        """Draw one of `grids` uniformly, from torch's own generator or the given one; without `grids`, return `grid`.

        In distributed training, each process draws its own grid in `forward`, and the slowest grid of each step delays
        the others. To draw the same grid, call `forward(x, grid=model.sample_grid(generator))` with generators of the
        same seed. Do the same with torch.compile, outside the compiled code: a draw breaks the graph.
        """
        if self.grids is None:
            return self.grid
        device = torch.device("cpu") if generator is None else generator.device
        return self.grids[int(torch.randint(len(self.grids), (), generator=generator, device=device))]

    def lookup_grid_of(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return how many lookup tokens an image of `size` pixels has along each dimension.

        Raises:
            ValueError: the patch size does not divide `size`, or their numbers of dimensions differ.
        """
        if len(size) != len(self.patch_size) or any(
            pixels < 1 or pixels % patch for pixels, patch in zip(size, self.patch_size, strict=True)
        ):
            raise ValueError(
                f"tokred_kernels.{OP}: img_size must be a multiple of the patch size {self.patch_size}, got "
                f"{tuple(size)}; give another img_size or patch_size"
            )
        return tuple(pixels // patch for pixels, patch in zip(size, self.patch_size, strict=True))

    def compressed_grid(self, grid: Any, lookup_grid: tuple[int, ...], name: str = "grid") -> tuple[int, ...]:
        """Return `grid` as a tuple; messages call it `name`.

        Raises:
            TypeError, ValueError: it differs from `lookup_grid` in rank, or has a number that is not from 1 to the one
                there.
        """
        if not isinstance(grid, (tuple, list, torch.Size)) or len(grid) != len(lookup_grid):
            raise ValueError(
                f"tokred_kernels.{OP}: {name} must have {len(lookup_grid)} numbers, as the lookup grid {lookup_grid} "
                f"has, got {shown(grid)}"
            )
        for tokens, most in zip(grid, lookup_grid, strict=True):
            check_count(OP, name, tokens, least=1)
            if tokens > most:
                raise ValueError(
                    f"tokred_kernels.{OP}: {name} must be at most the lookup grid {lookup_grid} in each dimension, got "
                    f"{tuple(grid)}"
                )
        return tuple(grid)

    def _grid_of_images(self, x: Any) -> tuple[int, ...]:
        check_floating(OP, "x", x)
        rank = len(self.patch_size)
        if x.dim() != rank + 2 or x.shape[1] != self.in_chans:
            wanted = ", ".join(("B", str(self.in_chans), *("time", "height", "width")[-rank:]))
            raise ValueError(f"tokred_kernels.{OP}: x must be ({wanted}), got shape {shape(x)}")
        size = tuple(x.shape[2:])
        if not self.dynamic_img_size and size != self.img_size:
            raise ValueError(
                f"tokred_kernels.{OP}: x must have images of {self.img_size} pixels, got {size}; for other sizes, "
                "make the model with dynamic_img_size=True"
            )
        return self.lookup_grid_of(size)

    def _choices(self, grids: Any) -> tuple[tuple[int, ...], ...]:
        if not isinstance(grids, (tuple, list)) or not grids:
            raise ValueError(
                f"tokred_kernels.{OP}: grids must be a list of at least one grid, or None, got {shown(grids)}"
            )
        return tuple(self.compressed_grid(one, self.lookup_grid, "each of grids") for one in grids)


class PatchEmbed(nn.Module):
    """Embed the patches of images, with the parameters of timm's PatchEmbed."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: tuple[int, ...]) -> None:
        super().__init__()
        convolution: Any = CONVOLUTIONS[len(patch_size)]
        self.proj = convolution(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, ...) to (B, N, D), in row order."""
        return self.proj(x).flatten(2).transpose(1, 2)


def lookupvit_tiny(num_classes: int = 1000, grid: Sequence[int] = (7, 7), **more: Any) -> LookupViT:
    """Make a `LookupViT` with the embedding dimension, depth and heads of ViT-Ti; `more` are its other settings."""
    return LookupViT(num_classes=num_classes, grid=grid, **{**_named(192, 12, 3), **more})


def lookupvit_small(num_classes: int = 1000, grid: Sequence[int] = (7, 7), **more: Any) -> LookupViT:
    """Make a `LookupViT` with the embedding dimension, depth and heads of ViT-S; `more` are its other settings."""
    return LookupViT(num_classes=num_classes, grid=grid, **{**_named(384, 12, 6), **more})


def lookupvit_base(num_classes: int = 1000, grid: Sequence[int] = (7, 7), **more: Any) -> LookupViT:
    """Make a `LookupViT` with the embedding dimension, depth and heads of ViT-B; `more` are its other settings."""
    return LookupViT(num_classes=num_classes, grid=grid, **{**_named(768, 12, 12), **more})


def lookupvit_large(num_classes: int = 1000, grid: Sequence[int] = (7, 7), **more: Any) -> LookupViT:
    """Make a `LookupViT` with the embedding dimension, depth and heads of ViT-L; `more` are its other settings."""
    return LookupViT(num_classes=num_classes, grid=grid, **{**_named(1024, 24, 16), **more})


def _named(embed_dim: int, depth: int, num_heads: int) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}


def _head(embed_dim: int, num_classes: int) -> nn.Module:
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(embed_dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=HEAD_STD)
    nn.init.zeros_(head.bias)
    return head


def _sizes(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """Return one number per dimension."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank
    if len(sizes) != rank:
        raise ValueError(f"tokred_kernels.{OP}: {name} must have {rank} numbers, or be one, got {value}")
    return tuple(check_count(OP, name, size, least=1, most=MAX_ROWS) for size in sizes)
