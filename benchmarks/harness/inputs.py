# SPDX-License-Identifier: MIT
"""Random inputs. None has zeros, which would hide unwritten outputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.case import Case

LARGEST_SIZE = 4  # each token stands for 1 to 4 tokens, as after some layers; exact in every dtype
SMOOTH_OVER = 4  # tokens
TEXTURE = 1.5  # largest standard deviation of the texture; that of the smooth part is at most 1


def normal(case: Case, seed: int) -> Callable[..., Tensor]:
    """Return a function that draws float32 tensors of a given shape on the case's device."""
    generator = torch.Generator(case.device).manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, device=case.device)


def sizes(case: Case, seed: int) -> Tensor:
    """Return token sizes (B, N, 1), float32."""
    generator = torch.Generator(case.device).manual_seed(seed)
    shape = (*case.shape[:2], 1)
    return torch.randint(1, LARGEST_SIZE + 1, shape, generator=generator, device=case.device).float()


def picture(case: Case, channels: int, seed: int) -> Tensor:
    """Return tokens (B, N, C) like those of a picture: neighbours are similar, in some regions more than in others."""
    draw = normal(case, seed)
    batch, height, width = case.shape[0], *case.grid

    def smooth(channels: int) -> Tensor:
        coarse = draw(batch, channels, height // SMOOTH_OVER + 2, width // SMOOTH_OVER + 2)
        return F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)

    # Every image has the same distribution of strengths, so the number of similar tokens differs little between images.
    ranked = smooth(1).flatten(1).argsort(1).argsort(1).view(batch, 1, height, width)
    strength = TEXTURE * (ranked + 1) / (height * width)
    pixels = smooth(channels) + strength * draw(batch, channels, height, width)
    tokens = torch.cat([draw(batch, case.prefix, channels), pixels.flatten(2).transpose(1, 2)], 1)
    return tokens.to(case.torch_dtype)


def halfway(score: Tensor, r: int) -> float:
    """Return the threshold that `r` of `score` (B, S) reach in the image where the fewest reach it."""
    ordered = score.sort(1, descending=True).values
    image = int(ordered[:, r - 1].argmin())
    return float(ordered[image, r - 1 : r + 1].mean())
