# SPDX-License-Identifier: MIT
"""ALGM's global matching: merge every pair whose similarity reaches a threshold."""

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
    """Merge every pair of an even and an odd token that is similar (ALGM, section 3.3: global bipartite matching, GBM).

    Like `bipartite_match`, but the number of pairs depends on the tokens: it is the number of sources whose best
    similarity reaches the threshold. The threshold is given, or is mean + std / layer_index of the best similarities.

    Args:
        metric: (B, N, D), or keys (B, H, N, d), whose mean over heads is used; (T, D) if `packed`. Not differentiated.
        layer_index: above 0, the number of the layer, counted from 1. Deeper layers have a lower threshold. Give this
            or `threshold`.
        threshold: a cosine.
        class_token, distill_token, num_prefix: the protected tokens, as in `bipartite_match`. The mean and std leave
            protected sources out.
        count: how many sources join. "batch", as in ALGM: each image merges as many sources as the image of the batch
            with the fewest that reach the threshold, so that the output is rectangular; the mean and the unbiased std
            are computed for each image and averaged over the batch. "image": each image merges all sources that reach
            its own threshold, as if it were alone in the batch, and the map is packed. An int: that many in each image,
            as in `bipartite_match`; no threshold is needed.
        packed: the starts of the images in a packed metric, such as `token_map.packed` of the previous map. Needs
            count="image".
        group: with count="batch", a torch.distributed process group that shares the smallest count, so that all its
            processes have equal shapes. None for this process alone.

    Returns:
        A TokenMap; the identity if nothing joins. Packed for count="image"; there, images without a pair keep their
        tokens in order.

    "batch" and "image" read the B counts back to the host. An int reads nothing: use it in CUDA graphs and
    torch.compile.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: wrong shapes; both or neither of `layer_index` and `threshold`; a threshold that is NaN; an unknown
            `count`; `packed` without count="image", or `group` without count="batch".
        RuntimeError: the backend requested by name cannot run the call.
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
