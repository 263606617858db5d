# SPDX-License-Identifier: MIT
"""ALGM's global matching: as many pairs as are alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokred_kernels import backends
from tokred_kernels.checks import check_floating, check_metric, check_real, check_same_device, prefix_length, shape
from tokred_kernels.namedtuples import namedtuple_replace
from tokred_kernels.ops.autograd import constant
from tokred_kernels.ops.bipartite_match import bipartite_match
from tokred_kernels.ops.build_match_map import build_match_map
from tokred_kernels.ops.count_above_threshold import count_above_threshold
from tokred_kernels.ops.counts import BATCH, IMAGE, check_count_mode, check_readable, check_threshold, smallest
from tokred_kernels.ops.rank_candidates import rank_candidates
from tokred_kernels.packing import Packing, check_packing
from tokred_kernels.partition import every_other
from tokred_kernels.token_map import TokenMap

OP = "adaptive_bipartite_match"


def adaptive_bipartite_match(
    metric: Tensor,
    *,
    layer_index: float | None = None,
    threshold: float | None = None,
    class_token: bool = False,
    distill_token: bool = False,
    num_prefix: int = 0,
    count: int | str = BATCH,
    packed: Packing | None = None,
    group: Any = None,
) -> TokenMap:
    """Merge every pair of an even and an odd token that is alike (ALGM, section 3.3: global bipartite matching, GBM).

    As `bipartite_match`, with a count that the tokens decide: that of the sources whose best similarity reaches the
    threshold, which is given, or is mean + std / layer_index of those best similarities.

    Args:
        metric: (B, N, D), or the keys of all heads (B, H, N, d), whose mean is taken; (T, D) if `packed`. Not
            differentiated.
        layer_index: above 0, the number of the layer, counted from 1; the deeper, the lower the threshold. Give this or
            `threshold`.
        threshold: a cosine.
        class_token, distill_token, num_prefix: what is protected, as in `bipartite_match`; protected sources have no
            part in mean and std.
        count: how many sources join. "batch" (ALGM's): in every image the smallest number, over the batch, of sources
            that reach the threshold, so that the output is a rectangle; mean and unbiased std are taken in each image,
            and averaged over the batch. "image": in each image all that reach its own threshold, as if it came alone;
            the map is packed. An int: so many in each image, as in `bipartite_match`, and no threshold is needed.
        packed: where the images of a packed metric start, such as `token_map.packed` of the map before. Needs
            count="image".
        group: with count="batch", a torch.distributed process group over which the smallest number is taken too, so
            that all its processes keep equal shapes; None for this process alone.

    Returns:
        A TokenMap; the identity where nothing joins. Packed for count="image", where images without a pair keep their
        tokens in place.

    "batch" reads the B counts back to the host, "image" too. An int reads nothing: use it in CUDA graphs and
    torch.compile.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes; both or neither of `layer_index` and `threshold`; a threshold that is NaN; an unknown
            `count`; `packed` or `group` with another count than theirs.
        RuntimeError: the backend asked for cannot serve the call.
    """
    count = check_count_mode(OP, count, group)
    if packed is not None:
        packed = check_packing(OP, packed)
    _check_metric(metric, packed, count)
    given = 0.0 if threshold is None else check_threshold(OP, threshold)
    divisor = 0.0 if layer_index is None else check_real(OP, "layer_index", layer_index, above=0)
    if not isinstance(count, str):
        return bipartite_match(
            metric, count, class_token=class_token, distill_token=distill_token, num_prefix=num_prefix
        )
    if (layer_index is None) == (threshold is None):
        raise ValueError(f"tokred_kernels.{OP}: give layer_index or threshold, got {layer_index=} and {threshold=}")
    check_readable(OP, "metric", metric)
    prefix = prefix_length(OP, num_prefix, class_token, distill_token)
    longest = metric.shape[-2] if packed is None else max(packed.lengths, default=0)
    partition = every_other(longest, longest, prefix, class_token, distill_token)
    if partition is None:
        return _identity(metric, packed, count)
    metric = constant(metric)
    backend = backends.choose("rank_candidates", metric)
    score, partner, rank = rank_candidates(metric, partition, backend, None if packed is None else packed.cu_seqlens)
    counts = count_above_threshold(score, given, divisor, count == IMAGE, backend)
    if count == IMAGE:
        return build_match_map(partner, rank, partition, metric.shape[-2], backend, counts, packed)
    partition = namedtuple_replace(partition, r=smallest(counts, group))
    if partition.r == 0:
        return _identity(metric, packed, count)
    return build_match_map(partner, rank, partition, metric.shape[-2], backend)


def _check_metric(metric: Any, packed: Packing | None, count: Any) -> None:
    if packed is None:
        return check_metric(OP, metric)
    if count != IMAGE:
        raise ValueError(f'tokred_kernels.{OP}: packed needs count="image", got count={count!r}')
    check_floating(OP, "metric", metric)
    if metric.dim() != 2 or metric.shape[0] != packed.rows:
        raise ValueError(
            f"tokred_kernels.{OP}: metric must be (T, D) with the T = {packed.rows} rows of packed, "
            f"got shape {shape(metric)}"
        )
    check_same_device(OP, "packed", packed.cu_seqlens, "metric", metric)


def _identity(metric: Tensor, packed: Packing | None, count: Any) -> TokenMap:
    if count != IMAGE:
        return TokenMap.identity(metric.shape[0], metric.shape[-2], metric.device)
    lengths = (metric.shape[-2],) * metric.shape[0] if packed is None else packed.lengths
    out = Packing.of(lengths, metric.device) if packed is None else packed
    one = TokenMap.identity(1, out.rows, metric.device)
    dest = one.dest.view(metric.shape[:-1] if metric.dim() < 4 else (metric.shape[0], metric.shape[2]))
    members, begin, count = one.views()
    return TokenMap._trusted(dest, out.rows, members, begin.view(-1), count.view(-1), out, packed)
