// SPDX-License-Identifier: MIT
// Lookup attention, gather: flash attention of few queries over many keys.
#include <cmath>
#include <limits>

#include "lookup_head.h"

TOKRED_KERNELS_BEGIN
namespace {

// What a chunk leaves: sums (queries, padded) of e^(s - highest) v, and of each query its highest score and the sum of
// e^(s - highest).
template <class Sum>
struct ChunkSums {
  Sum *out, *highest, *sum;
  ChunkSums(Sum* at, const LookupShape& s)
      : out(at), highest(at + s.queries * s.padded), sum(at + s.queries * (s.padded + 1)) {}
  static int64_t size(const LookupShape& s) { return s.queries * (s.padded + 2); }
};

template <class T, class Sum>
void gather_chunk(const LookupGatherArgs& a, const LookupShape& s, const LookupTask& t, const ChunkSums<Sum>& sums) {
  const int64_t block = kKeyBlock * s.padded;
  thread_local Arena arena;
  Sum* next =
      arena.take<Sum>(s.queries * s.padded + block + kKeyBlock * a.channels + kQueryBlock * (kKeyBlock + s.padded));
  const auto take = [&](int64_t values) { return std::exchange(next, next + values); };
  Sum *queries = take(s.queries * s.padded), *rows = take(block), *panels = take(kKeyBlock * a.channels);
  Sum *scores = take(kQueryBlock * kKeyBlock), *out = take(kQueryBlock * s.padded);
  const Sum scale = static_cast<Sum>(a.scale);

  pack_rows(strided_row<T>(a.q, a.q_strides, t, 0), a.q_strides[2], a.compressed, a.channels, s.queries, s.padded,
            queries);
  clear(sums.out, s.queries * s.padded);
  clear(sums.sum, s.queries);
  std::fill(sums.highest, sums.highest + s.queries, -std::numeric_limits<Sum>::infinity());
  each_key_block(t, [&](int64_t key, int64_t keys) {
    // The keys lie as rows only until they are panels; then the values take their place.
    pack_rows(strided_row<T>(a.k, a.k_strides, t, key), a.k_strides[2], keys, a.channels, kKeyBlock, s.padded, rows);
    pack_panels(rows, kKeyBlock, a.channels, s.padded, panels);
    pack_rows(strided_row<T>(a.v, a.v_strides, t, key), a.v_strides[2], keys, a.channels, kKeyBlock, s.padded, rows);
    NextRows<T> next_keys(a, t, key, a.k, a.k_strides), next_values(a, t, key, a.v, a.v_strides);
    each_query_block(a, [&](int64_t query, int64_t count) {
      multiply_panels(queries + query * s.padded, s.padded, panels, a.channels, kKeyBlock, scores, count);
      Sum shrink[kQueryBlock];
      for (int64_t m = 0; m < count; ++m) {
        next_keys.fetch_some();
        next_values.fetch_some();
        Sum *row = scores + m * kKeyBlock, &highest = sums.highest[query + m];
        Sum top = highest;
#pragma omp simd reduction(max : top)
        for (int64_t j = 0; j < keys; ++j) {
          row[j] *= scale;
          top = row[j] > top ? row[j] : top;
        }
        Sum sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < keys; ++j) {
          row[j] = exponential(row[j] - top);
          sum += row[j];
        }
        shrink[m] = exponential(highest - top);
        sums.sum[query + m] = sums.sum[query + m] * shrink[m] + sum;
        highest = top;
      }
      multiply_rows(scores, kKeyBlock, rows, keys, s.padded, out, count);
      for (int64_t m = 0; m < count; ++m) {
        Sum* to = sums.out + (query + m) * s.padded;
#pragma omp simd
        for (int64_t c = 0; c < s.padded; ++c) to[c] = to[c] * shrink[m] + out[m * s.padded + c];
      }
    });
  });
}

// The chunks of a head, each seen from the highest of them all.
template <class T, class Sum>
void combine(const LookupGatherArgs& a, const LookupShape& s, std::vector<Sum>& all, LookupTask t) {
  const auto of = [&](int64_t chunk) {
    t.chunk = chunk;
    return ChunkSums<Sum>(task_sums(all, a, s.chunks, t, ChunkSums<Sum>::size(s)), s);
  };
  std::vector<Sum> row(s.padded);
  for (int64_t m = 0; m < a.compressed; ++m) {
    Sum highest = -std::numeric_limits<Sum>::infinity(), sum = 0;
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk) highest = std::max(highest, of(chunk).highest[m]);
    std::fill(row.begin(), row.end(), Sum(0));
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
      const ChunkSums<Sum> sums = of(chunk);
      const Sum shrink = exponential(sums.highest[m] - highest);
      sum += sums.sum[m] * shrink;
      for (int64_t c = 0; c < s.padded; ++c) row[c] += sums.out[m * s.padded + c] * shrink;
    }
    store_result(row.data(), s.padded, 1, a.channels, 1 / sum, result_row<T>(a.out, a, a.compressed, t, m), 0);
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
    std::vector<Sum> all(a.images * a.heads * s.chunks * each);
    each_chunk(a, s.chunks, [&](const LookupTask& t) {
      gather_chunk<T>(a, s, t, ChunkSums<Sum>(task_sums(all, a, s.chunks, t, each), s));
    });
#pragma omp parallel for schedule(static)
    for (int64_t pair = 0; pair < a.images * a.heads; ++pair) {
      combine<T>(a, s, all, {pair / a.heads, pair % a.heads, 0, 0, 0});
    }
  });
}

TOKRED_KERNELS_END
