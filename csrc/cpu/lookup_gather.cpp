// SPDX-License-Identifier: MIT
// Lookup attention, gather: flash attention of few queries over many keys.
#include <cmath>
#include <limits>

#include "lookup_head.h"

TOKRED_KERNELS_BEGIN
namespace {

// What a chunk leaves: of each query the sum of e^(s - highest) v, its highest score and the sum of e^(s - highest).
template <class Sum>
struct ChunkSums {
  Sum *out, *highest, *sum;
  ChunkSums(Sum* at, const LookupShape& s)
      : out(at), highest(at + s.sums * s.padded), sum(at + s.sums * s.padded + s.queries) {}
  static int64_t size(const LookupShape& s) { return s.sums * s.padded + 2 * s.queries; }
};

// From scores (count, queries) to e^(s - highest), in place, with what the chunk has so far seen from the new highest.
template <class Sum>
void weigh_by_highest(const LookupProblem& a, const LookupShape& s, int64_t count, Sum* scores, Sum* shrink,
                      const ChunkSums<Sum>& so_far) {
  Sum *highest = so_far.highest, *sum = so_far.sum;
  std::copy_n(highest, s.queries, shrink);
  for (int64_t j = 0; j < count; ++j) {
    const Sum* row = scores + j * s.queries;
#pragma omp simd
    for (int64_t m = 0; m < s.queries; ++m) highest[m] = row[m] > highest[m] ? row[m] : highest[m];
  }
#pragma omp simd
  for (int64_t m = 0; m < s.queries; ++m) {
    shrink[m] = exponential(shrink[m] - highest[m]);
    sum[m] *= shrink[m];
  }
  for (int64_t m = 0; m < a.compressed; ++m) {
    Sum* out = so_far.out + m * s.padded;
#pragma omp simd
    for (int64_t c = 0; c < s.padded; ++c) out[c] *= shrink[m];
  }
  for (int64_t j = 0; j < count; ++j) {
    Sum* row = scores + j * s.queries;
#pragma omp simd
    for (int64_t m = 0; m < s.queries; ++m) {
      row[m] = exponential(row[m] - highest[m]);
      sum[m] += row[m];
    }
  }
}

template <class T, class Sum>
void gather_chunk(const LookupGatherArgs& a, const LookupShape& s, const LookupTask& t, const ChunkSums<Sum>& sums) {
  thread_local Arena arena;
  Sum* next = arena.take<Sum>(2 * s.rows() + s.queries + 2 * s.block() + s.weights());
  const auto take = [&](int64_t values) { return std::exchange(next, next + values); };
  const Few<T, Sum> queries(a, s, t, a.q, a.q_strides, static_cast<Sum>(a.scale), take);
  Sum *shrink = take(s.queries), *keys = take(s.block()), *values = take(s.block()), *weights = take(s.weights());

  clear(sums.out, s.sums * s.padded);
  clear(sums.sum, s.queries);
  std::fill(sums.highest, sums.highest + s.queries, -std::numeric_limits<Sum>::infinity());
  each_key_block(s, t, [&](int64_t key, int64_t count) {
    pack_block<T>(a, s, t, key, count, a.k, a.k_strides, keys);
    pack_block<T>(a, s, t, key, count, a.v, a.v_strides, values);
    multiply_panels(keys, s.padded, queries.panels, a.channels, s.queries, weights, count);
    weigh_by_highest(a, s, count, weights, shrink, sums);
    add_outer(weights, s.queries, a.compressed, values, s.padded, sums.out, count);
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
    const LookupShape s = lookup_shape<Sum>(a);
    const int64_t each = ChunkSums<Sum>::size(s);
    Arena arena;
    Sum* all = arena.take<Sum>(a.images * a.heads * s.chunks * each);
    each_chunk(a, s, [&](const LookupTask& t) {
      gather_chunk<T>(a, s, t, ChunkSums<Sum>(task_sums(all, a, s.chunks, t, each), s));
    });
#pragma omp parallel for schedule(static)
    for (int64_t pair = 0; pair < a.images * a.heads; ++pair) {
      combine<T>(a, s, all, {pair / a.heads, pair % a.heads, 0, 0, 0});
    }
  });
}

TOKRED_KERNELS_END
