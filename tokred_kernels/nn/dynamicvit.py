# SPDX-License-Identifier: MIT
"""DynamicViT's parts: the predictor, its decisions, and the losses that train it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokred_kernels.checks import (
    WIDEST,
    check_count,
    check_dense,
    check_flag,
    check_floating,
    check_real,
    check_same_device,
    check_tokens,
    is_per_row,
    shape,
    shown,
)

KEEP = 0  # of the predictor's two classes
INIT_STD = 0.02  # as published


class TokenPredictor(nn.Module):
    """Score each token by its own features and the mean of the kept tokens (DynamicViT, section 3.2).

    The parameters have the names and shapes of the published `PredictorLG`, `score_predictor` in checkpoints.

    Args:
        embed_dim: C, a multiple of 4.
    """

    def __init__(self, embed_dim: int = 384) -> None:
        super().__init__()
        embed_dim = check_count("nn.TokenPredictor", "embed_dim", embed_dim, least=4, most=WIDEST)
        if embed_dim % 4:
            raise ValueError(f"tokred_kernels.nn.TokenPredictor: embed_dim must be a multiple of 4, got {embed_dim}")
        self.in_conv = nn.Sequential(nn.LayerNorm(embed_dim), nn.Linear(embed_dim, embed_dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(embed_dim, embed_dim // 2),
            nn.GELU(),
            nn.Linear(embed_dim // 2, embed_dim // 4),
            nn.GELU(),
            nn.Linear(embed_dim // 4, 2),
            nn.LogSoftmax(dim=-1),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=INIT_STD)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, policy: Tensor) -> Tensor:
        """Return the log-probabilities (B, N, 2) of keeping and of dropping each token.

        Args:
            x: (B, N, C), without prefix tokens.
            policy: (B, N, 1) or (B, N), 1 for tokens that were kept so far, else 0. If an image kept none, the mean is
                zero.
        """
        check_tokens("nn.TokenPredictor", "x", x)
        check_dense("nn.TokenPredictor", "policy", policy)
        check_same_device("nn.TokenPredictor", "policy", policy, "x", x)
        if x.shape[2] != (width := self.in_conv[1].in_features):
            raise ValueError(f"tokred_kernels.nn.TokenPredictor: x must be (B, N, {width}), got shape {shape(x)}")
        if not is_per_row(policy, x.shape[:2]):
            raise ValueError(
                f"tokred_kernels.nn.TokenPredictor: policy must be {(*x.shape[:2], 1)} as x is {shape(x)}, "
                f"got {shape(policy)}"
            )
        policy = policy.reshape(*x.shape[:2], 1).to(x.dtype)
        x = self.in_conv(x)
        own, others = x.chunk(2, dim=-1)
        kept = policy.sum(1, keepdim=True)
        mean = (others * policy).sum(1, keepdim=True) / torch.where(kept == 0, 1.0, kept)
        return self.out_conv(torch.cat([own, mean.expand_as(others)], -1))


def decide(log_probabilities: Tensor, policy: Tensor) -> Tensor:
    """Draw a policy (B, N) of 0 and 1 by Gumbel-softmax with its straight-through gradient (DynamicViT, section 3.3).

    Args:
        log_probabilities: (B, N, 2), from `TokenPredictor`.
        policy: (B, N), the previous policy; tokens that it drops stay dropped.
    """
    check_floating("nn.decide", "log_probabilities", log_probabilities)
    if log_probabilities.dim() != 3 or log_probabilities.shape[2] != 2:
        got = shape(log_probabilities)
        raise ValueError(f"tokred_kernels.nn.decide: log_probabilities must be (B, N, 2), got {got}")
    _check_policy("decide", policy, "log_probabilities", log_probabilities)
    return F.gumbel_softmax(log_probabilities.float(), hard=True)[..., KEEP] * policy


def _check_policy(function: str, policy: Tensor, name: str, tokens: Tensor) -> None:
    """Raise ValueError unless `policy` has one entry per token: a column would broadcast to all pairs."""
    check_dense(f"nn.{function}", "policy", policy)
    check_same_device(f"nn.{function}", "policy", policy, name, tokens)
    if policy.shape != tokens.shape[:2]:
        raise ValueError(
            f"tokred_kernels.nn.{function}: policy must be {tuple(tokens.shape[:2])} as {name} are {shape(tokens)}, "
            f"got {shape(policy)}"
        )


def ratio_loss(policies: Sequence[Tensor], keep: Sequence[float] | float) -> Tensor:
    """Return the mean squared distance between the kept share of each image and the target (DynamicViT, equation 14).

    Args:
        policies: the policy of each pruning layer, (B, N) without prefix tokens.
        keep: the target shares of all N tokens, one number for all layers or one per layer.
    """
    op = "nn.ratio_loss"
    if not isinstance(policies, (list, tuple)) or not policies:
        raise TypeError(f"tokred_kernels.{op}: policies must be a list of at least one tensor, got {shown(policies)}")
    for policy in policies:
        check_dense(op, "policies", policy)
        if policy.dim() != 2:
            raise ValueError(f"tokred_kernels.{op}: policies must be tensors (B, N), got shape {shape(policy)}")
    given: Sequence[Any] = keep if isinstance(keep, (list, tuple)) else [keep] * len(policies)
    shares = [check_real(op, "keep", share) for share in given]
    if len(policies) != len(shares):
        raise ValueError(
            f"tokred_kernels.nn.ratio_loss: keep must have a share for each of the {len(policies)} policies, "
            f"got {len(shares)}"
        )
    distances = [
        (policy.float().mean(1) - share).square().mean() for policy, share in zip(policies, shares, strict=True)
    ]
    return torch.stack(distances).mean()


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, tokens: Tensor, teacher_tokens: Tensor, policy: Tensor, *, mse: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the distances of a pruned model from its teacher (DynamicViT, equations 12 and 13).

    This is the published `DistillDiffPruningLoss_dynamic`.

    Args:
        logits, teacher_logits: (B, classes).
        tokens, teacher_tokens: (B, N, C), without prefix tokens.
        policy: (B, N), the last policy; only the tokens that it keeps are compared.
        mse: True compares tokens by mean squared distance, False by the Kullback-Leibler divergence of their softmax.

    Returns:
        The Kullback-Leibler divergence from the teacher's predictions, and the distance of the kept tokens, which is 0
        if there are none.
    """
    op = "nn.distillation_loss"
    for name, value, other_name, other in (
        ("logits", logits, "teacher_logits", teacher_logits),
        ("tokens", tokens, "teacher_tokens", teacher_tokens),
    ):
        check_floating(op, name, value)
        check_floating(op, other_name, other)
        check_same_device(op, other_name, other, name, value)
        if value.shape != other.shape:
            raise ValueError(
                f"tokred_kernels.{op}: {name} and {other_name} must have the same shape, got {shape(value)} and "
                f"{shape(other)}"
            )
    if logits.dim() != 2 or not logits.shape[0]:
        raise ValueError(f"tokred_kernels.{op}: logits must be (B, classes), got shape {shape(logits)}")
    if tokens.dim() != 3:
        raise ValueError(f"tokred_kernels.{op}: tokens must be (B, N, C), got shape {shape(tokens)}")
    check_flag(op, "mse", mse)
    _check_policy("distillation_loss", policy, "tokens", tokens)
    if policy.is_complex():
        raise TypeError(f"tokred_kernels.{op}: policy must be real, got {policy.dtype}")
    predictions = F.kl_div(
        logits.log_softmax(-1), teacher_logits.log_softmax(-1), reduction="batchmean", log_target=True
    )
    weight = (policy > 0.5).to(tokens.dtype)
    number = weight.sum().clamp(min=1)
    if mse:
        distance = (tokens - teacher_tokens).square().mean(-1)
    else:
        log_tokens, log_teacher = tokens.log_softmax(-1), teacher_tokens.log_softmax(-1)
        distance = F.kl_div(log_tokens, log_teacher, reduction="none", log_target=True).sum(-1)
    return predictions, (distance * weight).sum() / number
