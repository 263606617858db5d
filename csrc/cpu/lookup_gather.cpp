// SPDX-License-Identifier: MIT
// Lookup attention, gather: flash attention of few queries over many keys.
#include <cmath>
#include <limits>

#include "lookup_products.h"

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

// From scores (count, queries), to be multiplied by `factor`, to e^(s - highest), in place, with what the chunk has so
// far seen from the new highest: `shrink` says how much smaller it is now.
template <class Sum>
void weigh_by_highest(const LookupShape& s, int64_t count, Sum* scores, Sum factor, Sum* shrink,
                      const ChunkSums<Sum>& so_far) {
  Sum *highest = so_far.highest, *sum = so_far.sum;
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
  using Products = typename LookupOf<T>::Type;
  using Keys = typename Products::template Block<true, false>;
  using Values = typename Products::template Block<false, true>;
  using Sums = typename Products::Sums;
  thread_local Arena arena;
  Sum* next = arena.take<Sum>(Products::Few::size(s) + Products::size(s) + Keys::size(s) + Values::size(s) +
                              Sums::size(s) + s.queries + s.weights());
  const auto take = [&](int64_t values) { return std::exchange(next, next + values); };
  const typename Products::Few queries(a, s, t, a.q, a.q_strides, a.scale, take);
  const Products products(s, take);
  const Keys keys(s, take);
  const Values values(s, take);
  const Sums sums(s, so_far.out, take);
  Sum *shrink = take(s.queries), *weights = take(s.weights());
  const Sum factor = Products::score_factor(a);

  [[maybe_unused]] const typename Products::Means means;
  clear(so_far.sum, s.queries);
  std::fill(so_far.highest, so_far.highest + s.queries, -std::numeric_limits<Sum>::infinity());
  each_key_block(s, t, [&](int64_t key, int64_t count) {
    keys.load(a, s, t, key, count, a.k, a.k_strides);
    values.load(a, s, t, key, count, a.v, a.v_strides);
    products.score(a, s, keys, queries, count, weights);
    weigh_by_highest(s, count, weights, factor, shrink, so_far);
    sums.shrink(a, s, shrink);
    products.reduce(a, s, weights, values, count, sums);
  });
  sums.finish(a, s);
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
#pragma omp parallel for schedule(static)
    for (int64_t pair = 0; pair < a.images * a.heads; ++pair) {
      combine<T>(a, s, all, {pair / a.heads, pair % a.heads, 0, 0, 0});
    }
  });
}

TOKRED_KERNELS_END
