# SPDX-License-Identifier: MIT
"""Cases of token_attention and its backward, against attention with all weights in memory, in float64."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokred_kernels.backends.reference.lookup_gather import lookup_scores
from tokred_kernels.backends.reference.token_attention import (
    POLICY_EPS,
    attention_weights,
    importance_of,
    token_attention,
)
from tokred_kernels.backends.selfcheck.cases import compare, inputs
from tokred_kernels.backends.torch_attention import torchs_attention
from tokred_kernels.packing import Packing

# A bias or not, a policy or not, and the importance.
MODES = (
    (True, False, ""),
    (False, False, "class"),
    (True, True, "mean"),
    (False, True, ""),
    (True, False, "last"),
    (False, False, ""),
    (False, True, "class"),
    (True, False, "mean"),
    (True, True, "last"),
)
PACKED = (17, 0, 1, 2, 33)


class Call(NamedTuple):
    """The forward's arguments: q, k, v (B, H, N, d), or packed (T, H, d); bias and policy (B, N), or (T,)."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    policy: Tensor | None
    starts: Tensor | None
    longest: int
    scale: float
    importance: str

    def images(self, *others: Tensor | None) -> Iterator[tuple[Call, list[Any]]]:
        """Each packed image as a batch of one, or the call itself; with its rows of the `others`."""
        if self.starts is None:
            yield self, list(others)
            return
        for first, end in itertools.pairwise(self.starts.tolist()):
            if end > first:
                rows = [None if t is None else t[None, first:end] for t in (*self[:5], *others)]
                heads = [compare.heads_last(t) for t in rows[:3] if t is not None]
                yield Call._make((*heads, *rows[3:5], None, 0, *self[7:])), rows[5:]

    def scores(self) -> Tensor:
        """The scores (B, H, N, N), in float32 or float64."""
        scores = lookup_scores(self.q, self.k, self.scale)
        return scores if self.bias is None else scores + self.bias[:, None, None, :]

    def seen(self) -> Tensor | float:
        """The policy of each query and key (B, 1, N, N): a query always sees itself."""
        if self.policy is None:
            return 1.0
        own = torch.eye(self.q.shape[2], dtype=torch.bool, device=self.q.device)
        return torch.where(own, 1.0, self.policy[:, None, None, :])

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The highest score of each row, e^(score - highest), and the divisor of the row's weights."""
        scores = self.scores()
        highest = scores.amax(-1)
        e = (scores - highest[..., None]).exp()
        return highest, e, (e * self.seen()).sum(-1) + (0.0 if self.policy is None else POLICY_EPS)

    def weights(self) -> Tensor:
        """The weights (B, H, N, N)."""
        return attention_weights(self.q, self.k, self.bias, self.policy, self.scale)

    def packing(self) -> Packing | None:
        """The packing of the rows."""
        return None if self.starts is None else Packing(self.starts, tuple(self.starts.diff().tolist()))


def _join(images: Sequence[Tensor], call: Call) -> Tensor:
    """Put results (B, N, ...) of the images together, packed if the call is."""
    return images[0] if call.starts is None else torch.cat([image[0] for image in images])


def _forward(call: Call) -> list[compare.Output]:
    parts, roundings, dtype = [], 0.0, call.q.dtype
    for image, _ in Call._make(compare.doubled(call)).images():
        roundings = max(roundings, compare.weight_roundings(image.q, image.k, call.scale))
        weights, (highest, _, total) = image.weights(), image.rows()
        importance = importance_of(weights, call.importance) if call.importance else weights[:, 0, 0]
        results = [weights @ image.v, compare.factor(weights, dtype) @ image.v.abs(), highest, total]
        parts.append([*map(compare.heads_last, results), importance])
    out, magnitude, highest, total, importance = (_join(part, call) for part in zip(*parts, strict=True))
    # A score of size s is off by s roundings, and its weight by as large a part.
    error = roundings * compare.SINGLE
    if call.policy is None:  # only both together are specified: weights are exp(score - row_max) / row_sum
        rows = [compare.Output("row_max + log(row_sum)", highest + total.log(), torch.float32, error)]
    else:  # eps is relative to the highest score
        rows = [compare.Output("row_max", highest, torch.float32, error)]
        rows.append(compare.Output("row_sum", total, torch.float32, error * total + 1e-38))
    given = compare.closely("importance", importance, importance, roundings, torch.float32)
    rows.append(given if call.importance else compare.absent("importance"))
    return [compare.closely("out", out, magnitude, roundings, dtype, dtype), *rows]


def _check_forward(check: compare.Check, outputs: tuple[Tensor, ...]) -> str | None:
    """Combine row_max and row_sum, where only both together are specified."""
    out, row_max, row_sum, importance = outputs
    if row_max.shape != row_sum.shape:
        return f"row_sum: expected the shape of row_max {tuple(row_max.shape)}, got {tuple(row_sum.shape)}"
    return check((out, row_max + row_sum.log(), importance))


def _gradients(arguments: tuple[Any, ...]) -> list[compare.Output]:
    """Gradients by autograd in float64, and the sums of the absolute terms that they consist of."""
    dtype, arguments = arguments[0].dtype, compare.doubled(arguments)
    call, wants = _call_of(arguments), arguments[-2:]
    found, roundings = [], 0.0
    for image, (grad_out, grad_importance) in call.images(*arguments[:2]):
        grad_out = compare.heads_last(grad_out)  # noqa: PLW2901
        roundings = max(roundings, compare.weight_roundings(image.q, image.k, call.scale))
        leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in image[:5]]
        weights = Call._make((*leaves, *image[5:])).weights()
        results, grads = [weights @ leaves[2]], [grad_out]
        if grad_importance is not None:
            results.append(importance_of(weights, call.importance))
            grads.append(grad_importance)
        exact = torch.autograd.grad(results, [t for t in leaves if t is not None], grads)
        sizes = _magnitudes(image, weights.detach(), grad_out, grad_importance, dtype)
        found.append([compare.heads_last(t) if t.dim() == 4 else t for t in (*exact, *sizes)])
    joined = [_join(part, call) for part in zip(*found, strict=True)]
    names = ["grad_q", "grad_k", "grad_v"]
    names += [name for name, t in (("grad_bias", call.bias), ("grad_policy", call.policy)) if t is not None]
    outputs = {
        name: compare.closely(name, value, size, roundings, dtype if value.dim() > 2 else torch.float32, dtype)
        for name, value, size in zip(names, joined, joined[len(names) :], strict=False)
    }
    last = zip(("grad_bias", "grad_policy"), wants, strict=True)
    return [
        *(outputs[name] for name in names[:3]),
        *(outputs[name] if want else compare.absent(name) for name, want in last),
    ]


def _magnitudes(
    call: Call, weights: Tensor, grad_out: Tensor, grad_importance: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """The sums of the absolute terms of the gradients of q, k, v, bias and policy."""
    _, e, total = call.rows()
    reached = grad_out.abs() @ call.v.abs().transpose(-2, -1)
    if grad_importance is not None:
        heads, number = weights.shape[1:3]
        share = grad_importance.abs()[:, None, None, :] / (heads * (number if call.importance == "mean" else 1))
        reached[:, :, {"class": slice(1), "mean": slice(None), "last": slice(-1, None)}[call.importance]] += share
    unseen = (reached + (weights * reached).sum(-1, keepdim=True)) * e / total[..., None]
    moved = unseen * call.seen()
    if call.policy is not None:
        moved = moved + (e == 1) * moved.sum(-1, keepdim=True)  # the highest score gets what the others lack
    wide, scale = compare.factor(moved, dtype), abs(call.scale)
    sizes = [wide @ call.k.abs() * scale, wide.transpose(-2, -1) @ call.q.abs() * scale]
    sizes.append(compare.factor(weights, dtype).transpose(-2, -1) @ grad_out.abs())
    sizes += [] if call.bias is None else [moved.sum((1, 2))]
    return sizes if call.policy is None else [*sizes, unseen.sum((1, 2))]


def _call(
    draw: inputs.Draw, rows: tuple[int, ...], heads: int, channels: int, dtype: torch.dtype, layout: str, mode: Any
) -> Call:
    """Random arguments for `rows`: (B, N), or the lengths of packed images if there are more than two."""
    packed = len(rows) > 2
    biased, chosen, importance = mode
    per_token = (sum(rows),) if packed else rows
    shape = (sum(rows), heads, channels) if packed else (rows[0], heads, rows[1], channels)
    q, k, v = (inputs.HEAD_LAYOUTS[layout](draw.normal(*shape).to(dtype)) for _ in range(3))
    bias = draw.integers(1, 9, *per_token).float().log() if biased else None
    policy = draw.uniform(*per_token) if chosen else None
    if policy is not None:  # kept, dropped and between
        policy = torch.where(draw.uniform(*per_token) < 0.6, policy.round(), policy)
    starts, longest = (inputs.row_starts(rows), max(rows)) if packed else (None, 0)
    return Call(q, k, v, bias, policy, starts, longest, 1 / math.sqrt(channels), importance)


def _calls(op: str, level: inputs.Level) -> Iterator[tuple[str, inputs.Draw, Call]]:
    mixed = level.mix(
        compiled=("mode", "channels", "layout"),
        number=level.sizes(1, 2, 17, 197, 577, 1089, interpreted=(1, 2, 9, 17, 40, 150), deep=(3, 64, 65)),
        dtype=inputs.DTYPES,
        mode=MODES,
        channels=inputs.CHANNELS,
        layout=tuple(inputs.HEAD_LAYOUTS),
        heads=(2, 4),  # Triton compiles anew for one head: for the last case only
    )
    for number, dtype, mode, channels, layout, heads in mixed:
        large = number > (100 if level.interpreted else 1000)
        images = 1 if large else 2
        shape = f"N={number} H={heads} C={channels} {layout}"
        name = inputs.name_of(dtype, shape, "bias" * mode[0], "policy" * mode[1], mode[2])
        draw = inputs.Draw(op, name)
        yield name, draw, _call(draw, (images, number), heads, channels, dtype, layout, mode)
    for dtype, mode, channels in zip(inputs.DTYPES, (MODES[0], MODES[2], MODES[6]), (64, 33, 72), strict=True):
        name = inputs.name_of(dtype, f"packed C={channels}", "bias" * mode[0], "policy" * mode[1], mode[2])
        draw = inputs.Draw(op, name)
        lengths, heads = (PACKED, 1) if level.interpreted else ((*PACKED, 70, 197), 2)
        yield name, draw, _call(draw, lengths, heads, channels, dtype, "projected", mode)
    name = "float32 dropped key far above the others"
    draw = inputs.Draw(op, name)
    call = _call(draw, (1, 41), 2, 72, torch.float32, "contiguous", (False, False, "class"))
    call.q[..., 0], call.k[..., 0], call.k[:, :, 7, 0] = 4.0, 0.0, 10.0
    yield name, draw, call._replace(policy=(torch.arange(41) != 7).float()[None])
    if not level.interpreted:
        name = "bfloat16 N=2049 H=1 C=8 bias"
        draw = inputs.Draw(op, name)
        yield name, draw, _call(draw, (1, 2049), 1, 8, torch.bfloat16, "contiguous", MODES[0])


def _forward_case(name: str, call: Call) -> inputs.Case:
    check = compare.expect(functools.partial(_forward, call))
    return inputs.Case(
        name, tuple(call), check if call.policy is not None else functools.partial(_check_forward, check)
    )


def _forward_cases(level: inputs.Level) -> Iterator[inputs.Case]:
    for name, _, call in _calls("forward", level):
        yield _forward_case(name, call)
    for dtype in inputs.DTYPES:
        name = inputs.name_of(dtype, "NaN in one key")
        call = _call(inputs.Draw(name), (2, 34), 2, 64, dtype, "contiguous", MODES[0])
        call.k[1, 0, 7, 3] = torch.nan
        yield _forward_case(name, call)


def _backward_cases(level: inputs.Level) -> Iterator[inputs.Case]:
    for name, draw, call in _calls("backward", level):
        # The same gradients for every number of tokens: which are wanted decides what Triton compiles.
        i = len(call.importance) + call.q.shape[-1]
        out, row_max, row_sum, _ = _forward_call(call)
        grad_out = inputs.HEAD_LAYOUTS["contiguous" if i % 2 else "sliced"](draw.normal(*out.shape).to(out.dtype))
        grad_importance = draw.normal(*out.shape[:-2]) if call.importance and i % 5 != 4 else None
        wants = call.bias is not None and i % 3 != 2, call.policy is not None and i % 4 != 3
        arguments = (grad_out, grad_importance, *call[:6], out, row_max, row_sum, *call[6:], *wants)
        yield inputs.Case(name, arguments, compare.expect(functools.partial(_gradients, arguments)))


def cases(op: str, level: inputs.Level) -> Iterator[inputs.Case]:
    """The cases of `op`."""
    return _forward_cases(level) if op == "token_attention" else _backward_cases(level)


def _call_of(arguments: tuple[Any, ...]) -> Call:
    """The forward's arguments among those of the backward."""
    return Call._make((*arguments[2:8], *arguments[11:14]))


def _reference(call: Call) -> tuple[Tensor, Tensor]:
    """The reference's output as it lies in memory, and the importance."""
    out, importance = token_attention(
        call.q, call.k, call.v, call.bias, call.policy, call.packing(), call.scale, call.importance
    )
    return out if call.starts is not None else compare.heads_last(out), importance


def _forward_call(call: Call) -> tuple[Tensor, ...]:
    """The reference's output, the row statistics that a kernel's backward needs, and the importance."""
    out, importance = _reference(call)
    rows = [[compare.heads_last(part) for part in image.rows()[::2]] for image, _ in call.images()]
    row_max, row_sum = (_join(part, call).contiguous() for part in zip(*rows, strict=True))
    return out.contiguous(), row_max, row_sum, importance


def reference_call(op: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The reference's outputs, as the kernels have them; gradients by autograd."""
    if op == "token_attention":
        return _forward_call(Call(*arguments))
    call, wants = _call_of(arguments), (True, True, True, *arguments[-2:])
    leaves = [None if t is None else t.detach().requires_grad_(w) for t, w in zip(call[:5], wants, strict=True)]
    results = _reference(Call._make((*leaves, *call[5:])))
    used = 1 if arguments[1] is None else 2
    wanted = [leaf for leaf, want in zip(leaves, wants, strict=True) if leaf is not None and want]
    found = iter(torch.autograd.grad(results[:used], wanted, arguments[:used]))
    grads = [next(found) if want else results[1].new_empty(0) for want in wants]
    return (*(g if call.starts is not None else compare.heads_last(g) for g in grads[:3]), *grads[3:])


def sdpa_call(op: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The output of torch's own attention, or the gradients of q, k and v; for a call with at most a bias."""
    call = Call(*arguments) if op == "token_attention" else _call_of(arguments)
    if call.policy is not None or call.starts is not None or call.importance:
        raise ValueError("sdpa_call: torch's attention takes a bias only, got a policy, packed images or an importance")
    if op == "token_attention":
        return (compare.heads_last(torchs_attention(call.q, call.k, call.v, call.bias, scale=call.scale)),)
    q, k, v = (t.detach().requires_grad_() for t in call[:3])
    out = torchs_attention(q, k, v, call.bias, scale=call.scale)
    return tuple(map(compare.heads_last, torch.autograd.grad(out, (q, k, v), arguments[0].transpose(1, 2))))


def timing_cases(op: str) -> Iterator[inputs.TimingCase]:
    """The blocks of ViT-S and ViT-B with sizes, as ToMe calls them."""
    for (images, heads, number), dtype in itertools.product(((64, 6, 197), (16, 12, 577)), inputs.TIMED_DTYPES):
        name = inputs.name_of(dtype, f"{images}x{heads}x{number}x64")
        draw = inputs.Draw(op, name)
        call = _call(draw, (images, number), heads, 64, dtype, "projected", MODES[0])
        arguments: tuple[Any, ...] = tuple(call)
        if op == "token_attention_backward":
            out = draw.normal(images, number, heads, 64).to(dtype)
            row_max, row_sum = torch.full(out.shape[:-1], 4.0), torch.full(out.shape[:-1], float(number))
            arguments = out, None, *call[:6], out, row_max, row_sum, *call[6:], False, False
        yield inputs.TimingCase(name, dtype, arguments)
