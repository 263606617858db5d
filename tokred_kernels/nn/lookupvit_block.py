# SPDX-License-Identifier: MIT
"""LookupViT's block: process a few compressed tokens in full, and exchange features with many lookup tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokred_kernels.checks import WIDEST, check_count, check_dense, check_flag, check_real, check_same_device, shape
from tokred_kernels.nn.attention import attend
from tokred_kernels.ops.lookup_gather import lookup_gather
from tokred_kernels.ops.lookup_scatter import lookup_scatter

OP = "nn.LookupViTBlock"
NORM_EPS = 1e-6  # that of vision transformers


class LookupViTBlock(nn.Module):
    """One block on M compressed and N lookup tokens (LookupViT, section 3, algorithms 1 to 3).

    These steps run in order, each with a norm before it and a residual around it:

    1. compressed tokens gather from lookup tokens: cross attention with weights A, (B, H, M, N), never stored;
    2. and 3. self attention and MLP on compressed tokens, as in a plain ViT block;
    4. lookup tokens receive values projected from the compressed tokens, weighted by A transposed;
    5. a narrow MLP on lookup tokens.

    Parameters of 2 and 3 have the names and shapes of timm's Block: `norm1`, `attn`, `ls1`, `norm2`, `mlp`, `ls2`.

    Args:
        dim: D.
        num_heads: H, a divisor of D, for all attention.
        mlp_ratio: p, for a hidden dimension p D of the MLP on compressed tokens.
        lookup_ratio: q, for a hidden dimension D / q of the MLP on lookup tokens.
        qkv_bias: whether queries, keys and values have biases.
        scatter_proj: True adds an output projection after step 4, on all N tokens, for 2 N D^2 operations. Default
            False, which is as cheap as published.
        drop_path: the probability that an image skips a residual branch in training, drawn for each branch.
        init_values: the initial layer scale at the end of each branch; None for no layer scale.
        proj_drop: dropout after projections and inside MLPs.
        attn_drop: dropout of the weights of self attention. The weights of cross attention are never stored, so they
            have no dropout.
        norm_eps: the eps of the layer norms.

    Linear layers start with Xavier's uniform rule, applied to each projection separately, as in the original ViT. This
    keeps the scale of attention scores independent of D.

    Raises:
        TypeError, ValueError: a wrong setting; `num_heads` that do not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        lookup_ratio: float = 2.0,
        qkv_bias: bool = True,
        scatter_proj: bool = False,
        drop_path: float = 0.0,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        check_heads(OP, "dim", dim, num_heads)
        check_above_zero(OP, mlp_ratio=mlp_ratio, lookup_ratio=lookup_ratio)
        check_probabilities(OP, drop_path=drop_path, proj_drop=proj_drop, attn_drop=attn_drop)
        check_block(OP, qkv_bias, scatter_proj, init_values, norm_eps)

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(dim, eps=norm_eps)

        def scale() -> nn.Module:
            return nn.Identity() if init_values is None else LayerScale(dim, init_values)

        self.gather = Gather(dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop, norm_eps=norm_eps)
        self.ls_gather = scale()
        self.norm1 = norm()
        self.attn = SelfAttention(dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop, attn_drop=attn_drop)
        self.ls1 = scale()
        self.norm2 = norm()
        self.mlp = Mlp(dim, max(1, int(dim * mlp_ratio)), drop=proj_drop)
        self.ls2 = scale()
        self.scatter = Scatter(
            dim, num_heads, qkv_bias=qkv_bias, proj=scatter_proj, proj_drop=proj_drop, norm_eps=norm_eps
        )
        self.ls_scatter = scale()
        self.norm_lookup = norm()
        self.mlp_lookup = Mlp(dim, max(1, int(dim / lookup_ratio)), drop=proj_drop)
        self.ls_lookup = scale()
        self.drop_path = DropPath(drop_path)

    def forward(self, z_p: Tensor, z_l: Tensor) -> tuple[Tensor, Tensor]:
        """Map compressed tokens (B, M, D) and lookup tokens (B, N, D), with M from 1 to N, to the same shapes.

        Raises:
            ValueError: wrong shapes, or M above N.
        """
        self._check(z_p, z_l)
        gathered, q, k, lse = self.gather(z_p, z_l)
        z_p = z_p + self.drop_path(self.ls_gather(gathered))
        z_p = z_p + self.drop_path(self.ls1(self.attn(self.norm1(z_p))))
        z_p = z_p + self.drop_path(self.ls2(self.mlp(self.norm2(z_p))))
        z_l = z_l + self.drop_path(self.ls_scatter(self.scatter(z_p, q, k, lse)))
        z_l = z_l + self.drop_path(self.ls_lookup(self.mlp_lookup(self.norm_lookup(z_l))))
        return z_p, z_l

    def _check(self, z_p: Tensor, z_l: Tensor) -> None:
        dim = self.norm1.normalized_shape[0]
        for name, tokens in (("z_p", z_p), ("z_l", z_l)):
            check_dense(OP, name, tokens)
            if tokens.dim() != 3 or tokens.shape[2] != dim:
                raise ValueError(
                    f"tokred_kernels.{OP}: {name} must be (B, tokens, {dim}) as dim is {dim}, got {shape(tokens)}"
                )
        check_same_device(OP, "z_p", z_p, "z_l", z_l)
        if z_p.shape[0] != z_l.shape[0]:
            raise ValueError(
                f"tokred_kernels.{OP}: z_p and z_l must have the same batch size, got {z_p.shape[0]} and {z_l.shape[0]}"
            )
        if not 1 <= z_p.shape[1] <= z_l.shape[1]:
            raise ValueError(
                f"tokred_kernels.{OP}: z_p must have from 1 to N = {z_l.shape[1]} tokens, the number of z_l, got "
                f"{z_p.shape[1]}"
            )


class Gather(nn.Module):
    """Cross attention of compressed tokens over lookup tokens, MHBC l -> p (algorithm 1)."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, proj_drop: float, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_p = nn.LayerNorm(dim, eps=norm_eps)
        self.norm_l = nn.LayerNorm(dim, eps=norm_eps)
        self.q = _linear(dim, 1, bias=qkv_bias)
        self.kv = _linear(dim, 2, bias=qkv_bias)
        self.proj = _linear(dim, 1)
        self.proj_drop = nn.Dropout(float(proj_drop))

    def forward(self, z_p: Tensor, z_l: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gathered features (B, M, D), and q, k and the log-sum-exp, which define the weights."""
        q = _heads(self.q(self.norm_p(z_p)), self.num_heads)
        k, v = (_heads(part, self.num_heads) for part in self.kv(self.norm_l(z_l)).chunk(2, dim=-1))
        out, lse = lookup_gather(q, k, v)
        return self.proj_drop(self.proj(_join(out))), q, k, lse


class Scatter(nn.Module):
    """Send values of compressed tokens to lookup tokens with the weights of the gather, MHBC p -> l (algorithm 2)."""

    def __init__(
        self, dim: int, num_heads: int, *, qkv_bias: bool, proj: bool, proj_drop: float, norm_eps: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.v = _linear(dim, 1, bias=qkv_bias)
        self.proj = _linear(dim, 1) if proj else nn.Identity()
        self.proj_drop = nn.Dropout(float(proj_drop))

    def forward(self, z_p: Tensor, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        """Return the scattered features (B, N, D)."""
        v = _heads(self.v(self.norm(z_p)), self.num_heads)
        return self.proj_drop(self.proj(_join(lookup_scatter(q, k, v, lse))))


class SelfAttention(nn.Module):
    """Self attention of a ViT, with the parameters of timm's Attention."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool, proj_drop: float, attn_drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.qkv = _linear(dim, 3, bias=qkv_bias)
        self.proj = _linear(dim, 1)
        self.proj_drop = nn.Dropout(float(proj_drop))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, M, D) to (B, M, D)."""
        q, k, v = (_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        out, _ = attend(q, k, v, dropout=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(_join(out)))


class Mlp(nn.Module):
    """The MLP of a ViT, with the parameters of timm's Mlp."""

    def __init__(self, dim: int, hidden: int, *, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.drop = nn.Dropout(float(drop))
        self.fc2 = nn.Linear(hidden, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class LayerScale(nn.Module):
    """One learned factor per channel, with the parameter of timm's LayerScale."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, set random images to 0, and scale the others to keep the mean."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) to (B, N, D)."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1).bernoulli_(keep).div_(keep)


def check_heads(op: str, name: str, dim: Any, num_heads: Any) -> None:
    """Raise unless both are counts, and `num_heads` divides `dim`."""
    check_count(op, name, dim, least=1, most=WIDEST)
    check_count(op, "num_heads", num_heads, least=1)
    if dim % num_heads:
        raise ValueError(f"tokred_kernels.{op}: num_heads must divide {name} = {dim}, got {num_heads}")


def check_above_zero(op: str, **values: Any) -> None:
    """Raise unless each value, a factor of a dimension, is a finite number above 0 and at most `WIDEST`."""
    for name, value in values.items():
        if not 0 < check_real(op, name, value) <= WIDEST:
            raise ValueError(f"tokred_kernels.{op}: {name} must be above 0 and at most {WIDEST}, got {value}")


def check_block(op: str, qkv_bias: Any, scatter_proj: Any, init_values: Any, norm_eps: Any) -> None:
    """Raise unless the flags are bools, and the layer scale and eps are finite numbers."""
    check_flag(op, "qkv_bias", qkv_bias)
    check_flag(op, "scatter_proj", scatter_proj)
    if init_values is not None:
        check_real(op, "init_values", init_values)
    if check_real(op, "norm_eps", norm_eps) < 0:
        raise ValueError(f"tokred_kernels.{op}: norm_eps must be at least 0, got {norm_eps}")


def check_probabilities(op: str, **values: Any) -> None:
    """Raise unless each value is a number from 0 to below 1."""
    for name, value in values.items():
        if not 0 <= check_real(op, name, value) < 1:
            raise ValueError(f"tokred_kernels.{op}: {name} must be from 0 to below 1, got {value}")


def _linear(dim: int, parts: int, *, bias: bool = True) -> nn.Linear:
    """Make one layer of `parts` projections from D to D, each initialized like a separate layer."""
    layer = nn.Linear(dim, parts * dim, bias=bias)
    with torch.no_grad():
        for part in layer.weight.chunk(parts):
            nn.init.xavier_uniform_(part)
        if layer.bias is not None:
            layer.bias.zero_()
    return layer


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """View (B, N, D) as (B, H, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _join(x: Tensor) -> Tensor:
    """Join (B, H, N, d) to (B, N, D)."""
    return x.transpose(1, 2).flatten(-2)
