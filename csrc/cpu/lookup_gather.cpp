// SPDX-License-Identifier: MIT
// Lookup attention, gather: flash attention of few queries over many keys.
#include <cmath>
#include <limits>

#include "lookup_products.h"

TOKRED_KERNELS_BEGIN
namespace {

// What a chunk leaves: of each query the sum of e^(s - highest) v, its highest score and the sum of e^(s - highest);
// and by how much the last block shrank what came before.
template <class Sum>
struct ChunkSums {
  Sum *out, *highest, *sum, *shrink;
  ChunkSums(Sum* at, const LookupShape& s)
      : out(at), highest(at + s.sums * s.padded), sum(highest + s.queries), shrink(sum + s.queries) {}
  static int64_t size(const LookupShape& s) { return s.sums * s.padded + 3 * s.queries; }
};

// From scores (count, queries), to be multiplied by `factor`, to e^(s - highest), in place, with what the chunk has so
// far seen from the new highest: `shrink` says how much smaller it is now.
template <class Sum>
void weigh_by_highest(const LookupShape& s, int64_t count, Sum* scores, Sum factor, const ChunkSums<Sum>& so_far) {
  Sum *highest = so_far.highest, *sum = so_far.sum, *shrink = so_far.shrink;
  std::copy_n(highest, s.queries, shrink);
  for (int64_t j = 0; j < count; ++j) {
    const Sum* row = scores + j * s.queries;
#pragma omp simd
    for (int64_t m = 0; m < s.queries; ++m) {
      const Sum score = row[m] * factor;
      highest[m] = score > highest[m] ? score : highest[m];
    }
  }
#pragma omp simd
  for (int64_t m = 0; m < s.queries; ++m) {
    shrink[m] = exponential(shrink[m] - highest[m]);
    sum[m] *= shrink[m];
  }
  for (int64_t j = 0; j < count; ++j) {
    Sum* row = scores + j * s.queries;
#pragma omp simd
    for (int64_t m = 0; m < s.queries; ++m) {
      row[m] = exponential(row[m] * factor - highest[m]);
      sum[m] += row[m];
    }
  }
}

template <class T, class Sum>
void gather_chunk(const LookupGatherArgs& a, const LookupShape& s, const LookupTask& t, const ChunkSums<Sum>& so_far) {
  const Sum factor = LookupOf<T>::Type::score_factor(a);
  clear(so_far.sum, s.queries);
  std::fill(so_far.highest, so_far.highest + s.queries, -std::numeric_limits<Sum>::infinity());
  reduce_chunk<T>(a, s, t, a.v, a.v_strides, so_far.out, [&](int64_t count, Sum* scores, const auto& sums) {
    weigh_by_highest(s, count, scores, factor, so_far);
    sums.shrink(a, s, so_far.shrink);
  });
}

// The chunks of a head, each seen from the highest of them all.
template <class T, class Sum>
void combine(const LookupGatherArgs& a, const LookupShape& s, Sum* all, LookupTask t) {
  const auto of = [&](int64_t chunk) {
    t.chunk = chunk;
    return ChunkSums<Sum>(task_sums(all, a, s.chunks, t, ChunkSums<Sum>::size(s)), s);
  };
  thread_local Arena arena;
  Sum* row = arena.take<Sum>(s.padded);
  for (int64_t m = 0; m < a.compressed; ++m) {
    Sum highest = -std::numeric_limits<Sum>::infinity(), sum = 0;
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk) highest = std::max(highest, of(chunk).highest[m]);
    clear(row, s.padded);
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
      const ChunkSums<Sum> sums = of(chunk);
      const Sum shrink = exponential(sums.highest[m] - highest);
      sum += sums.sum[m] * shrink;
      for (int64_t c = 0; c < s.padded; ++c) row[c] += sums.out[m * s.padded + c] * shrink;
    }
    store_rows(row, s.padded, 1, a.channels, 1 / sum, result_row<T>(a.out, a, a.compressed, t, m), 0);
    static_cast<Sum*>(a.lse)[head_start(a, t) + m] = highest + std::log(sum);
  }
}

}  // namespace

void lookup_gather(const LookupGatherArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Element<T>::Sum;
    const LookupShape s = lookup_shape<typename LookupOf<T>::Type>(a);
    const int64_t each = ChunkSums<Sum>::size(s);
    Arena arena;
    Sum* all = arena.take<Sum>(a.images * a.heads * s.chunks * each);
    each_chunk(a, s, [&](const LookupTask& t) {
      gather_chunk<T>(a, s, t, ChunkSums<Sum>(task_sums(all, a, s.chunks, t, each), s));
    });
    for_each(a.images * a.heads, true,
             [&](int64_t pair) { combine<T>(a, s, all, {pair / a.heads, pair % a.heads, 0, 0, 0}); });
  });
}

TOKRED_KERNELS_END
