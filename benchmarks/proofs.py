# SPDX-License-Identifier: MIT
"""Proofs that a selector chose right, against cosines in float64, up to the rounding of the dtype that it computes in.

Every token that joined, joined its most similar destination; the tokens, or windows, that joined are the most similar
ones; there are as many as reach the threshold, where one decides; and every slot is in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokred_kernels.backends.reference.rank_candidates import best_destination, inverse_norm, tokens
from tokred_kernels.partition import Partition
from tokred_kernels.windows import Windows


class Disagreement(RuntimeError):
    """A provider's result is not what the others, or the reference, give."""


def prove_choice(dest: Tensor, metric: Tensor, partition: Partition, tie: float) -> None:
    """Raise Disagreement unless `dest` (B, N) is a map of `partition`, its choices within `tie` of the best cosines."""
    dest, batch, lead = dest.long(), dest.shape[0], partition.protected_src
    source, destination = tokens(partition, batch, dest.device)
    best, _ = best_destination(metric, partition, torch.float64)

    j = torch.arange(partition.num_dst, device=dest.device)
    interleaved = partition.protected_dst
    slot = partition.first + torch.where(j < interleaved, 2 * j + 1, partition.num_src - partition.r + j)
    if not torch.equal(dest.gather(1, destination), slot.expand(batch, -1)):
        raise Disagreement("a destination is not in its slot")
    _prove_leading(dest, partition.first)
    source_slot = dest.gather(1, source)
    if bool(((source_slot < 0) | (source_slot >= partition.num_out())).any()):
        raise Disagreement("a token goes nowhere")
    owner = dest.new_full((partition.num_out(),), -1)
    owner[slot] = j
    joined = owner[source_slot]  # the destination that each source joined, -1 for none
    if not bool(((joined >= 0).sum(1) == partition.r).all()) or bool((joined[:, :lead] >= 0).any()):
        raise Disagreement(f"not {partition.r} unprotected tokens joined")

    metric = metric.double() if metric.dim() == 3 else metric.double().mean(1).to(metric.dtype).double()
    unit = metric * inverse_norm(metric)
    other = destination.gather(1, joined.clamp(min=0))
    index = torch.stack([source, other])[..., None].expand(-1, -1, -1, unit.shape[2])
    cosine = (unit.gather(1, index[0]) * unit.gather(1, index[1])).sum(-1)
    loss = torch.where(joined >= 0, best - cosine, 0.0)
    if not float(loss.max()) <= tie:
        raise Disagreement(f"a token joined one that is {float(loss.max()):.2g} less similar than the best")
    _prove_best(best[:, lead:], joined[:, lead:] >= 0, tie, "token")

    # Those that stay: in the order of their slots, by index, or by descending similarity.
    key = torch.where(joined < 0, source_slot, partition.num_out())
    order = key.argsort(1)[:, : partition.num_src - partition.r]
    if partition.sources_by_index:
        step = -order.diff(dim=1).double()
        tie = 0.0
    else:
        step = best.gather(1, order)[:, lead:].diff(dim=1)
    if step.numel() and not float(step.max()) <= tie:
        raise Disagreement("the tokens that stay are not in order")


def prove_windows(dest: Tensor, num_out: int, x: Tensor, windows: Windows, threshold: float, tie: float) -> None:
    """Raise Disagreement unless `dest` (B, N) merges the most similar windows of x (B, N, C), and the right number."""
    dest, first = dest.long(), windows.first
    r, part = divmod(windows.num_tokens() - num_out, windows.size() - 1)
    if part or not 0 <= r <= windows.number():
        raise Disagreement(f"{num_out} slots are left by no number of merged windows")
    cosine = window_cosines(x, windows)
    prove_count(cosine, r, cosine.new_tensor(threshold), tie)

    inside = window_tokens(windows, dest.device)
    slot = dest[:, inside]  # (B, W, size)
    merged = ((slot >= first) & (slot < first + r)).any(-1)
    if bool((slot != slot[..., :1])[merged].any()):
        raise Disagreement("a window is merged in part")
    order = torch.where(merged, slot[..., 0], num_out).argsort(1)[:, :r]  # the windows by their slots
    ranked = torch.arange(first, first + r, device=dest.device).expand(dest.shape[0], -1)
    if not torch.equal(slot[..., 0].gather(1, order), ranked) or bool((merged.sum(1) != r).any()):
        raise Disagreement(f"not {r} windows are merged")
    _prove_best(cosine, merged, tie, "window")
    step = cosine.gather(1, order).diff(dim=1)
    if step.numel() and not float(step.max()) <= tie:
        raise Disagreement("the merged windows are not in order")

    _prove_leading(dest, first)
    stays = torch.ones_like(dest, dtype=torch.bool)
    stays[:, :first] = False
    stays[:, inside.flatten()] = ~merged.repeat_interleave(windows.size(), 1)
    by_index = first + r + stays.cumsum(1) - 1
    if bool((dest != by_index)[stays].any()):
        raise Disagreement("the tokens that stay are not in order")


def prove_adaptive_count(r: int, metric: Tensor, partition: Partition, layer_index: float, tie: float) -> None:
    """Raise Disagreement unless `r` is ALGM's count for `metric`, whose threshold is mean + std / layer_index."""
    best = best_cosines(metric, partition)
    threshold = best.mean(1).mean() + best.std(1).mean() / layer_index
    # With each similarity its mean and its deviation are off, too.
    prove_count(best, r, threshold, tie * (2 + 1 / layer_index))


def prove_count(score: Tensor, r: int, threshold: Tensor, tie: float) -> None:
    """Raise Disagreement unless `r` is the smallest count, over the batch, of `score` (B, S) that reach `threshold`."""
    least, most = (int((score >= threshold + step).sum(1).min()) for step in (tie, -tie))
    if not least <= r <= most:
        raise Disagreement(f"{r} joined, while {least} to {most} reach the threshold")


def best_cosines(metric: Tensor, partition: Partition) -> Tensor:
    """(B, sources that may join) float64: the highest cosine of each."""
    return best_destination(metric, partition, torch.float64)[0][:, partition.protected_src :]


def window_cosines(x: Tensor, windows: Windows) -> Tensor:
    """(B, W) float64: the mean cosine of the pairs of different tokens of each window, pair by pair."""
    vectors = x[:, window_tokens(windows, x.device)].double()
    unit = vectors * inverse_norm(vectors)
    pairs = unit @ unit.transpose(-1, -2)
    pairs.diagonal(dim1=-2, dim2=-1).zero_()
    return pairs.sum((-1, -2)) / (windows.size() * (windows.size() - 1))


def window_tokens(windows: Windows, device: torch.device) -> Tensor:
    """(W, size): the tokens of each window."""
    height, width = windows.height, windows.width
    token = torch.arange(windows.first, windows.num_tokens(), device=device)
    inside = token.view(windows.grid_height, -1)[: windows.down() * height, : windows.across() * width]
    cut = inside.reshape(windows.down(), height, windows.across(), width)
    return cut.transpose(1, 2).reshape(windows.number(), windows.size())


def _prove_leading(dest: Tensor, first: int) -> None:
    if bool((dest[:, :first] != torch.arange(first, device=dest.device)).any()):
        raise Disagreement("a leading token has moved")


def _prove_best(score: Tensor, chosen: Tensor, tie: float, what: str) -> None:
    """`chosen` (B, S) are the highest of `score`, in each image."""
    weakest = torch.where(chosen, score, torch.inf).amin(1)
    strongest = torch.where(chosen, -torch.inf, score).amax(1) if score.shape[1] else weakest
    if not bool((strongest <= weakest + tie).all()):
        margin = float((strongest - weakest).max())
        raise Disagreement(f"a {what} stayed that is {margin:.2g} more similar than one that joined")
