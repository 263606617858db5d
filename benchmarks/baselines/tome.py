# SPDX-License-Identifier: MIT
"""ToMe's chain of torch ops.

It has the ops of the authors' code (github.com/facebookresearch/ToMe) in the same order, so it runs the same kernels,
allocates the same temporaries and rounds in the same places. A plan is a tuple of tensors, which torch.compile can
return; its methods `merge` and `unmerge` are the two closures that the published functions return.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import tokred_kernels as tk

Merge = Callable[..., Tensor]


class Plan(Protocol):
    """What the plans of all baselines have."""

    joined: Tensor

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Reduce (B, N, C) to (B, N', C)."""


class BipartitePlan(NamedTuple):
    """Even tokens that stay (B, N/2 - r, 1), even tokens that join (B, r, 1), and the odd token that each joins."""

    staying: Tensor
    joining: Tensor
    joined: Tensor
    tokens: int
    distill_token: bool

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        even, odd = x[..., ::2, :], x[..., 1::2, :]
        channels = x.shape[-1]
        stay = even.gather(-2, self.staying.expand(-1, -1, channels))
        join = even.gather(-2, self.joining.expand(-1, -1, channels))
        odd = odd.scatter_reduce(-2, self.joined.expand(-1, -1, channels), join, reduce=mode)
        if self.distill_token:
            return torch.cat([stay[:, :1], odd[:, :1], stay[:, 1:], odd[:, 1:]], dim=1)
        return torch.cat([stay, odd], dim=1)

    def unmerge(self, y: Tensor) -> Tensor:
        num_staying, channels = self.staying.shape[1], y.shape[-1]
        stay, odd = y[..., :num_staying, :], y[..., num_staying:, :]
        join = odd.gather(-2, self.joined.expand(-1, -1, channels))
        x = torch.zeros(y.shape[0], self.tokens, channels, device=y.device, dtype=y.dtype)
        x[..., 1::2, :] = odd
        x.scatter_(-2, (2 * self.staying).expand(-1, -1, channels), stay)
        x.scatter_(-2, (2 * self.joining).expand(-1, -1, channels), join)
        return x


class KthPlan(NamedTuple):
    """The destination of each source (B, n (k - 1) / k, 1); the last of every `k` tokens is a destination."""

    joined: Tensor
    k: int

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        others, last = _split_kth(x, self.k)
        return last.scatter_reduce(-2, self.joined.expand(-1, -1, x.shape[-1]), others, reduce=mode)


class RandomPlan(NamedTuple):
    """The drawn tokens (B, r, 1), the others (B, N - r, 1), and the other token that each drawn one joins (B, r, 1)."""

    drawn: Tensor
    others: Tensor
    joined: Tensor

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drawn tokens and the others."""
        channels = x.shape[-1]
        return x.gather(1, self.drawn.expand(-1, -1, channels)), x.gather(1, self.others.expand(-1, -1, channels))

    def merge(self, x: Tensor, mode: str = "mean") -> Tensor:
        drawn, others = self.split(x)
        return others.scatter_reduce(-2, self.joined.expand(-1, -1, x.shape[-1]), drawn, reduce=mode)


def ranked_sources(metric: Tensor, class_token: bool, distill_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return each source's highest cosine and destination, (B, sources), and the sources by descending cosine.

    Sources are the even tokens, destinations the odd ones. ALGM's code begins in the same way.
    """
    unit = metric / metric.norm(dim=-1, keepdim=True)
    even, odd = unit[..., ::2, :], unit[..., 1::2, :]
    scores = even @ odd.transpose(-1, -2)
    if class_token:
        scores[..., 0, :] = -math.inf
    if distill_token:
        scores[..., :, 0] = -math.inf
    best, where = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    return best, where, order


def bipartite_plan(metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False) -> BipartitePlan:
    """Run ToMe's `bipartite_soft_matching` up to its closures, on a metric (B, N, D) or keys (B, H, N, d)."""
    if metric.dim() == 4:
        metric = metric.mean(1)  # as in ToMe's attention
    tokens = metric.shape[1]
    r = min(r, (tokens - int(class_token) - int(distill_token)) // 2)
    with torch.no_grad():
        _, where, order = ranked_sources(metric, class_token, distill_token)
        staying, joining = order[..., r:, :], order[..., :r, :]
        joined = where[..., None].gather(-2, joining)
        if class_token:
            staying = staying.sort(dim=1)[0]
    return BipartitePlan(staying, joining, joined, tokens, distill_token)


def kth_plan(metric: Tensor, k: int) -> KthPlan:
    """Run ToMe's `kth_bipartite_soft_matching` up to its closures."""
    with torch.no_grad():
        unit = metric / metric.norm(dim=-1, keepdim=True)
        others, last = _split_kth(unit, k)
        _, where = (others @ last.transpose(-1, -2)).max(dim=-1)
    return KthPlan(where[..., None], k)


def random_plan(metric: Tensor, r: int) -> RandomPlan:
    """Run ToMe's `random_bipartite_soft_matching` up to its closures."""
    with torch.no_grad():
        batch, tokens, _ = metric.shape
        order = torch.rand(batch, tokens, 1, device=metric.device).argsort(dim=1)
        unit = metric / metric.norm(dim=-1, keepdim=True)
        plan = RandomPlan(order[:, :r], order[:, r:], order)  # not matched yet
        drawn, others = plan.split(unit)
        _, where = (drawn @ others.transpose(-1, -2)).max(dim=-1)
    return plan._replace(joined=where[..., None])


def merge_wavg(merge: Merge, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the average of x weighted by size (B, N, 1), and the sum of the sizes."""
    if size is None:
        size = torch.ones_like(x[..., 0, None])
    x = merge(x * size, mode="sum")
    size = merge(size, mode="sum")
    return x / size, size


def merge_source(merge: Merge, x: Tensor, source: Tensor | None = None) -> Tensor:
    """Merge ToMe's `source`, a dense (B, N', N) matrix with a 1 for each token and its output token."""
    if source is None:
        batch, tokens, _ = x.shape
        source = torch.eye(tokens, device=x.device)[None].expand(batch, tokens, tokens)
    return merge(source, mode="amax")


def token_map(plan: Plan, tokens: int) -> tk.TokenMap:
    """Return a plan as a token map. This is not published: we use it to check plans."""
    batch, device = plan.joined.shape[0], plan.joined.device
    each = torch.eye(tokens, device=device, dtype=torch.float16)[None].expand(batch, tokens, tokens)
    found, dest = plan.merge(each, mode="amax").max(dim=1)  # over the output tokens
    slots = plan.merge(each[..., :1]).shape[1]
    return tk.TokenMap.from_dest(dest.masked_fill(found == 0, -1).int(), slots)


def _split_kth(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    groups = x[:, : tokens // k * k].view(batch, -1, k, channels)
    return groups[:, :, : k - 1].contiguous().view(batch, -1, channels), groups[:, :, k - 1]
