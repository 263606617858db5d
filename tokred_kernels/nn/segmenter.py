# SPDX-License-Identifier: MIT
"""Segmenter's linear head on a vision transformer, which can be patched."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tokred_kernels.checks import MAX_ROWS, check_count, check_flag, check_floating, shape
from tokred_kernels.ops.unmerge import unmerge

OP = "nn.LinearSegmenter"
INIT_STD = 0.02


class LinearDecoder(nn.Module):
    """A linear layer from tokens (..., C) to class scores (..., K).

    Its parameters are `head.weight` and `head.bias`, like those of Segmenter's DecoderLinear.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=INIT_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores of each token."""
        return self.head(x)


class LinearSegmenter(nn.Module):
    """Classify each pixel from the tokens of a vision transformer (Segmenter, Strudel et al. 2021, section 3.2).

    A linear layer maps each final token, without the prefix, to the scores of K classes. Bilinear upsampling maps these
    from the grid of patches to the image.

    The encoder can be patched before or after, with any method that has a `model.token_map`. A token-wise decoder
    commutes with unmerging, so it runs on the merged tokens, and its scores are unmerged: that gathers K channels
    instead of C. Other decoders need the grid, and run after unmerging. The tokens, or scores, of a dropped patch are
    0.

    Args:
        encoder: a timm VisionTransformer or Eva. Make it with `num_classes=0`, and with `global_pool=""` or "token",
            which keep its final norm on the tokens. With `dynamic_img_size=True` it accepts all image sizes that the
            patch size divides, and with `dynamic_img_pad=True` also all others.
        num_classes: K.
        decoder: a module to use instead of the linear layer. If token-wise, it maps (..., C) to (..., K), where ... is
            (B, N') or, for packed tokens, (T',). Else it maps the grid (B, C, h, w) to (B, K, any height, any width).
        token_wise: whether the decoder processes each token separately; False for convolutions.

    State dicts of published Segmenters with the linear head load into `decoder`. Published encoders use an eps of 1e-5,
    nn.LayerNorm's default, in all norms; timm's ViTs use 1e-6. For the same outputs, make the encoder with
    `norm_layer=torch.nn.LayerNorm`.

    Raises:
        TypeError: a wrong type.
        ValueError: `num_classes` under 1, or `token_wise=False` without a decoder.
    """

    def __init__(
        self, encoder: nn.Module, num_classes: int, *, decoder: nn.Module | None = None, token_wise: bool = True
    ) -> None:
        super().__init__()
        _check(encoder, decoder, token_wise)
        num_classes = check_count(OP, "num_classes", num_classes, least=1, most=MAX_ROWS)
        self.encoder: Any
        self.encoder = encoder
        self.num_classes = num_classes
        self.token_wise = token_wise
        self.decoder = LinearDecoder(self.encoder.embed_dim, num_classes) if decoder is None else decoder

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to scores (B, K, H, W).

        Raises:
            ValueError: an image size that the encoder does not support, or a decoder output without K channels.
        """
        height, width, stride = self._size(images)
        grid = self.encoder.patch_embed.dynamic_feat_size((height, width))
        token_map = None
        if hasattr(self.encoder, "forward_mapped"):
            x, token_map = self.encoder.forward_mapped(images)
        else:
            x = self.encoder.forward_features(images)
        if self.token_wise:
            x = self._decode(x, -1)
        if token_map is not None:
            x = unmerge(x, token_map)
        x = x[:, self.encoder.num_prefix_tokens :]
        if x.shape[1] != grid[0] * grid[1]:
            raise ValueError(
                f"tokred_kernels.{OP}: encoder must give a token for each of {grid[0]} x {grid[1]} patches, got "
                f"{x.shape[1]}; patch dropout removes some: set encoder.patch_drop = torch.nn.Identity()"
            )
        x = x.transpose(1, 2).unflatten(2, grid)
        if not self.token_wise:
            x = self._decode(x, 1)
        padded = (grid[0] * stride[0], grid[1] * stride[1])
        x = F.interpolate(x, size=padded, mode="bilinear", align_corners=False)
        return x[..., :height, :width]

    def _decode(self, x: Tensor, channel: int) -> Tensor:
        scores = self.decoder(x)
        if scores.shape[channel] != self.num_classes:
            raise ValueError(
                f"tokred_kernels.{OP}: decoder must give num_classes = {self.num_classes} channels, got shape "
                f"{shape(scores)} from {shape(x)}"
            )
        return scores

    def _size(self, images: Tensor) -> tuple[int, int, tuple[int, int]]:
        """Return height and width of the images, after checking them, and the pixels of a token."""
        embed = self.encoder.patch_embed
        check_floating(OP, "images", images)
        if images.dim() != 4:
            raise ValueError(f"tokred_kernels.{OP}: images must be (B, 3, H, W), got shape {shape(images)}")
        height, width = images.shape[2:]
        if embed.strict_img_size and (height, width) != tuple(embed.img_size):
            raise ValueError(
                f"tokred_kernels.{OP}: images must be of {tuple(embed.img_size)} pixels, got {(height, width)}; for "
                "other sizes, make the encoder with dynamic_img_size=True"
            )
        stride = tuple(embed.feat_ratio(as_scalar=False))
        if not embed.dynamic_img_pad and (height % stride[0] or width % stride[1]):
            raise ValueError(
                f"tokred_kernels.{OP}: images must have a size that the patch size {stride} divides, got "
                f"{(height, width)}; make the encoder with dynamic_img_pad=True, or pad them"
            )
        return height, width, stride


def _check(encoder: Any, decoder: Any, token_wise: Any) -> None:
    if not all(hasattr(encoder, name) for name in ("forward_features", "patch_embed", "num_prefix_tokens")):
        raise TypeError(
            f"tokred_kernels.{OP}: encoder must be a timm VisionTransformer or Eva, got {type(encoder).__name__}"
        )
    if decoder is not None and not isinstance(decoder, nn.Module):
        raise TypeError(f"tokred_kernels.{OP}: decoder must be a torch.nn.Module, got {type(decoder).__name__}")
    check_flag(OP, "token_wise", token_wise)
    if decoder is None and not token_wise:
        raise ValueError(f"tokred_kernels.{OP}: token_wise must be True without a decoder, got False")
