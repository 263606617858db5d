# SPDX-License-Identifier: MIT
"""Helpers of the tests: tolerances, checks of maps, and the selectors' definitions in plain loops."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import tokred_kernels as tk
from tokred_kernels import backends
from tokred_kernels import partition as partitions
from tokred_kernels.backends.reference import rank_candidates as reference
from tokred_kernels.backends.reference.build_match_map import dest_of_ranks

GOLDEN = Path(__file__).parent / "golden"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Cosines of unit vectors in float32 differ by a few roundings a channel between orders of summation.
COSINE_BAND = 4e-6


def slow(*values):
    """Return these values of a parametrization, marked slow."""
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow) for value in values
    ]


def golden(name, device="cpu"):
    """The recorded arrays as tensors on a device, and the parameters they were recorded with."""
    entry = next(e for e in json.loads((GOLDEN / "manifest.json").read_text()) if e["file"] == name)
    with np.load(GOLDEN / name) as arrays:
        return {key: torch.from_numpy(arrays[key]).to(device) for key in arrays}, entry["params"]


def assert_sum_close(actual, exact, terms, magnitude=None):
    """Assert that `actual` is `exact` (float64) up to one rounding to its dtype, and `terms` roundings in float32."""
    rounding = torch.finfo(actual.dtype).eps
    single = 0.0 if actual.dtype == torch.float64 else torch.finfo(torch.float32).eps * (terms + 2)
    magnitude = exact.abs() if magnitude is None else magnitude
    bound = rounding * exact.abs() + (single + rounding * 2 ** (-8)) * magnitude + torch.finfo(actual.dtype).tiny
    if actual.dtype == torch.float64:
        bound = bound + rounding * (terms + 2) * magnitude
    worst = ((actual.double() - exact).abs() - bound).max() if exact.numel() else torch.tensor(-1.0)
    assert worst <= 0, f"off by {worst:.3g} more than rounding explains"


def assert_valid_match(token_map, metric, r, *, prefix=None, class_token=False, distill_token=False):
    """Assert that the map follows float64 cosines, except for ties to within `COSINE_BAND`."""
    partition = partitions.every_other(metric.shape[-2], r, prefix, class_token, distill_token)
    if partition is None:
        identity = torch.arange(metric.shape[-2], dtype=torch.int32)
        assert torch.equal(token_map.dest.cpu(), identity.expand(token_map.dest.shape))
    else:
        assert_follows(token_map, metric, partition)


def assert_follows(token_map, metric, partition):
    """Assert the same for any partition, with its own `r`."""
    metric = metric.cpu()
    dest = token_map.dest.cpu().long()
    assert token_map.num_out == partition.num_out()
    assert torch.equal(dest[:, : partition.first], torch.arange(partition.first).expand(dest.shape[0], -1))
    best, index = reference.best_destination(metric, partition, torch.float64)
    _, partner, rank = reference.rank_sources(best, index, partition.protected_src)
    if torch.equal(dest_of_ranks(partner, rank, metric.shape[-2], partition), dest.int()):
        return
    source, destination = reference.tokens(partition, metric.shape[0], metric.device)
    rounded = metric.double().mean(1).to(metric.dtype) if metric.dim() == 4 else metric
    unit = rounded.double() * reference.inverse_norm(rounded.double())
    for image in range(dest.shape[0]):
        slot_of_destination = dest[image, destination[image]]
        assert slot_of_destination.unique().numel() == partition.num_dst
        where = torch.full((partition.num_out(),), -1)
        where[slot_of_destination] = destination[image]
        target = where[dest[image, source[image]]]  # the destination token each source shares a slot with, or -1
        joined = target >= 0
        assert int(joined.sum()) == partition.r
        assert not joined[: partition.protected_src].any()
        score = (unit[image, source[image][joined]] * unit[image, target[joined]]).sum(-1)
        band = COSINE_BAND if metric.dim() == 3 else head_band(metric.dtype)
        assert (score >= best[image][joined] - band).all(), "joined a destination that is not the most similar"
        free = ~joined
        free[: partition.protected_src] = False
        if free.any():
            assert best[image][joined].min() >= best[image][free].max() - band, "joined none of the r best"
            slots = dest[image, source[image][free]]
            order = best[image][free][slots.argsort()]
            if partition.sources_by_index:
                assert (slots.diff() > 0).all()
            else:
                assert (order.diff() <= band).all(), "unmerged sources are not in descending order"


def head_band(dtype):
    """The mean over heads is rounded to the metric's dtype: a last-place flip there moves a cosine by about that."""
    return COSINE_BAND + torch.finfo(dtype).eps


def random_map(batch, tokens, num_out, *, dropped=0.0, device="cpu"):
    """A map with random slots, some of them empty, and a share of its tokens dropped."""
    from tokred_kernels import TokenMap

    dest = torch.randint(0, max(num_out, 1), (batch, tokens))
    dest[torch.rand(batch, tokens) < dropped] = -1
    if num_out == 0:
        dest.fill_(-1)
    return TokenMap.from_dest(dest.to(device), num_out)


PACKED_SLOTS = (5, 1, 0, 17)


def random_packed_map(tokens, *, dropped=0.0, device="cpu"):
    """The same for four images that keep as many slots each as `PACKED_SLOTS` says.

    `tokens` is their N, or the lengths in which they come packed.
    """
    from tokred_kernels import Packing, TokenMap

    packed_in = None if isinstance(tokens, int) else Packing.of(tokens, torch.device(device))
    parts, start = [], 0
    for length, slots in zip([tokens] * 4 if packed_in is None else tokens, PACKED_SLOTS, strict=True):
        dest = random_map(1, length, slots, dropped=dropped).dest[0]
        parts.append(torch.where(dest < 0, -1, dest + start))
        start += slots
    dest = torch.stack(parts) if packed_in is None else torch.cat(parts)
    packed = Packing.of(PACKED_SLOTS, torch.device(device))
    return TokenMap(dest.to(device), start, packed=packed, packed_in=packed_in)


# What goes in: (B, N), or packed, one image being empty.
PACKED_TOKENS = pytest.mark.parametrize("tokens", [23, (9, 0, 4, 40)], ids=str)


def images_in(values, token_map):
    """The rows of each image before a map, each as a batch of one."""
    lengths = None if token_map.packed_in is None else token_map.packed_in.lengths
    return [part[None] for part in (values if lengths is None else values.split(lengths))]


def images_out(values, token_map):
    """The rows of each image after a packed map, each as a batch of one."""
    return [part[None] for part in values.split(token_map.packed.lengths)]


def assert_views(token_map):
    """Assert that `members`, `begin` and `count` agree with `dest`."""
    from tokred_kernels import TokenMap

    again = TokenMap(token_map.dest, token_map.num_out, packed=token_map.packed, packed_in=token_map.packed_in)
    for written, made in zip(token_map.views(), again.views(), strict=True):
        assert written.shape == made.shape
        assert torch.equal(written, made)


def on_reference(call, *arguments, **settings):
    """Return the result of `call` on the reference backend."""
    with tk.use_backend("reference"):
        return call(*arguments, **settings)


def assert_same_map(token_map, expected):
    """Both maps have the same slots, and the members, first places and counts of `token_map` agree with them."""
    assert token_map.num_out == expected.num_out
    assert torch.equal(token_map.dest.cpu(), expected.dest.cpu())
    assert_views(token_map)


def assert_as_reference(backend, op, *arguments):
    """Return what the kernel of `op` returns, and assert that it is the same as that of the reference."""
    got, expected = (backends.implementation(name, op)(*arguments) for name in (backend, "reference"))
    results, references = (part if isinstance(part, tuple) else (part,) for part in (got, expected))
    for one, other in zip(results, references, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other.view(one.shape))
    return got


def poison(monkeypatch):
    """Fill the memory of results with values that no kernel writes, so that a test sees elements left unwritten."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        fresh = new_empty(*args, **kwargs)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else -77)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **kwargs: tensor.new_empty(tensor.shape, **kwargs))


# The rest is the expected result: each selector's definition in plain loops over lists, in float64, for one image.
# Tokens are numbers, and a map is a list of slots, each a list of tokens.


def exact_tokens(*shape, zeros=0.1):
    """Tokens whose cosines no rounding touches, in any dtype, so that most of them tie: the last size a power of 4."""
    tokens = torch.randint(0, 2, shape) * 2.0 - 1
    tokens = tokens * 2.0 ** torch.randint(-2, 3, (*shape[:-1], 1))
    return torch.where(torch.rand(*shape[:-1], 1) < zeros, 0.0, tokens)


def cosines(tokens):
    """All pairwise cosines of the tokens (N, C), as lists; 0 with a zero token, -inf with one that is not finite."""
    tokens = tokens.double().cpu()
    norm = tokens.norm(dim=1, keepdim=True)
    unit = tokens / torch.where(norm < 1e-15, math.inf, norm)
    return (unit @ unit.T).nan_to_num(nan=-math.inf).tolist()


def partners(cosine, sources, destinations):
    """For each source the highest cosine and the destination that has it, the first of equals."""
    best = {s: max(destinations, key=lambda d: cosine[s][d]) for s in sources}
    return {s: (cosine[s][d], d) for s, d in best.items()}


def match_slots(best, destinations, r, *, lead=(), by_index=False):
    """The slots when the `r` best sources join: the `lead` tokens, unmerged sources, destinations with who joined."""
    order = sorted(best, key=lambda s: (-best[s][0], s))
    joined, unmerged = order[:r], order[r:]
    groups = {d: [d] for d in destinations}
    for s in joined:
        groups[best[s][1]].append(s)
    return [[token] for token in (*lead, *(sorted(unmerged) if by_index else unmerged))] + list(groups.values())


def every_other(number, prefix):
    """The tokens after the prefix that are sources, and those that are destinations, in ToMe's split."""
    rest = range(prefix, number)
    return [n for n in rest if n % 2 == 0], [n for n in rest if n % 2 == 1]


def every_other_partners(tokens, prefix):
    """The same as `partners` for that split of one image (N, C)."""
    sources, destinations = every_other(len(tokens), prefix)
    return partners(cosines(tokens), sources, destinations) if destinations else {}


def every_other_dest(best, number, r, prefix):
    """`dest` when the `r` best of them join."""
    if r == 0:
        return list(range(number))
    slots = match_slots(best, every_other(number, prefix)[1], r, lead=range(prefix), by_index=prefix > 0)
    return dest_of(slots, number)


def window_members(first, grid, window):
    """The tokens of each window, by rows."""
    (height, width), (down, across) = grid, window
    return [
        [first + (top + i) * width + left + j for i in range(down) for j in range(across)]
        for top in range(0, height - down + 1, down)
        for left in range(0, width - across + 1, across)
    ]


def window_scores(tokens, windows):
    """The mean cosine of the pairs of different tokens of each window of one image (N, C); -inf where undefined."""
    cosine = cosines(tokens)
    return [
        sum(cosine[a][b] for a in members for b in members if a != b) / (len(members) * (len(members) - 1))
        for members in windows
    ]


def window_slots(scores, windows, first, number, r):
    """The slots when the `r` windows of highest score merge, of `number` tokens."""
    order = sorted(range(len(windows)), key=lambda w: (-scores[w], w))[:r]
    gone = {token for w in order for token in windows[w]}
    others = [[n] for n in range(first, number) if n not in gone]
    return [[n] for n in range(first)] + [windows[w] for w in order] + others


def dest_of(slots, number):
    """The slot of each of `number` tokens."""
    dest = [-1] * number
    for slot, members in enumerate(slots):
        for token in members:
            assert dest[token] == -1
            dest[token] = slot
    return dest


def slots_of(dest, num_out):
    """The tokens of each slot, from the row of a `dest`."""
    slots = [[] for _ in range(num_out)]
    for token, slot in enumerate(dest.tolist()):
        slots[slot].append(token)
    return slots


def assert_valid_windows(token_map, x, r, *, first, grid, window):
    """Assert that the map merges the best `r` windows by float64 cosines, except for near-ties."""
    windows = window_members(first, grid, window)
    for image, dest in zip(x, token_map.dest, strict=True):
        scores = dict(enumerate(window_scores(image, windows)))
        slots = slots_of(dest, token_map.num_out)
        merged = [windows.index(members) for members in slots[first : first + r]]
        assert slots == window_slots(
            [-merged.index(w) if w in merged else -r for w in scores], windows, first, len(dest), r
        )
        ranked = [scores.pop(w) for w in merged]
        assert all(a >= b - COSINE_BAND for a, b in itertools.pairwise(ranked)), "not in descending order"
        if merged and scores:
            assert ranked[-1] >= max(scores.values()) - COSINE_BAND, "merged none of the r best"
