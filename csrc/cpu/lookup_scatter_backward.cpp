// SPDX-License-Identifier: MIT
// The gradients of lookup attention's scatter; the equations are in args.h.
#include "lookup_head.h"

TOKRED_KERNELS_BEGIN
namespace {

// What a chunk leaves: its share of grad_q and grad_v, (queries, padded) each, and of - grad_lse.
template <class Sum>
struct ChunkGrads {
  Sum *q, *v, *lse;
  ChunkGrads(Sum* at, const LookupShape& s) : q(at), v(at + s.queries * s.padded), lse(at + 2 * s.queries * s.padded) {}
  static int64_t size(const LookupShape& s) { return s.queries * (2 * s.padded + 1); }
};

template <class T, class Sum>
void differentiate_chunk(const LookupScatterBackwardArgs& a, const LookupShape& s, const LookupTask& t,
                         const ChunkGrads<Sum>& grad) {
  const int64_t block = kKeyBlock * s.padded, panel = kKeyBlock * a.channels, all = s.queries * s.padded;
  thread_local Arena arena;
  Sum* next = arena.take<Sum>(2 * all + 3 * block + 2 * panel + kQueryBlock * (2 * kKeyBlock + s.padded));
  const auto take = [&](int64_t values) { return std::exchange(next, next + values); };
  Sum *queries = take(all), *values = take(all), *keys = take(block), *grads = take(block), *grad_k = take(block);
  Sum *key_panels = take(panel), *grad_panels = take(panel);
  Sum *weights = take(kQueryBlock * kKeyBlock), *slopes = take(kQueryBlock * kKeyBlock);
  Sum* partial = take(kQueryBlock * s.padded);
  const Sum scale = static_cast<Sum>(a.scale);
  const Sum* lse = static_cast<const Sum*>(a.lse) + head_start(a, t);

  pack_rows(strided_row<T>(a.q, a.q_strides, t, 0), a.q_strides[2], a.compressed, a.channels, s.queries, s.padded,
            queries);
  pack_rows(strided_row<T>(a.v, a.v_strides, t, 0), a.v_strides[2], a.compressed, a.channels, s.queries, s.padded,
            values);
  clear(grad.q, ChunkGrads<Sum>::size(s));
  each_key_block(t, [&](int64_t key, int64_t number) {
    pack_rows(strided_row<T>(a.k, a.k_strides, t, key), a.k_strides[2], number, a.channels, kKeyBlock, s.padded, keys);
    pack_panels(keys, kKeyBlock, a.channels, s.padded, key_panels);
    pack_rows(strided_row<T>(a.grad_out, a.grad_out_strides, t, key), a.grad_out_strides[2], number, a.channels,
              kKeyBlock, s.padded, grads);
    pack_panels(grads, kKeyBlock, a.channels, s.padded, grad_panels);
    clear(grad_k, block);
    NextRows<T> next_keys(a, t, key, a.k, a.k_strides), next_grads(a, t, key, a.grad_out, a.grad_out_strides);
    each_query_block(a, [&](int64_t query, int64_t count) {
      const int64_t start = query * s.padded;
      multiply_panels(queries + start, s.padded, key_panels, a.channels, kKeyBlock, weights, count);
      multiply_panels(values + start, s.padded, grad_panels, a.channels, kKeyBlock, slopes, count);
      for (int64_t m = 0; m < count; ++m) {
        next_keys.fetch_some();
        next_grads.fetch_some();
        Sum *weight = weights + m * kKeyBlock, *slope = slopes + m * kKeyBlock;
        weigh_by_lse(weight, number, scale, lse[query + m]);
        Sum total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < number; ++j) {
          slope[j] *= weight[j];
          total += slope[j];
        }
        grad.lse[query + m] += total;
      }
      multiply_rows(slopes, kKeyBlock, keys, number, s.padded, partial, count);
      add_rows(partial, count * s.padded, grad.q + start);
      multiply_rows(weights, kKeyBlock, grads, number, s.padded, partial, count);
      add_rows(partial, count * s.padded, grad.v + start);
      add_outer(slopes, kKeyBlock, number, queries + start, s.padded, grad_k, count);
    });
    store_key_rows<T>(a, s, t, key, number, grad_k, scale, a.grad_k);
  });
}

}  // namespace

void lookup_scatter_backward(const LookupScatterBackwardArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Element<T>::Sum;
    const LookupShape s = lookup_shape<Sum>(a);
    const int64_t each = ChunkGrads<Sum>::size(s), rows = s.queries * s.padded;
    std::vector<Sum> sums(a.images * a.heads * s.chunks * each);
    each_chunk(a, s.chunks, [&](const LookupTask& t) {
      differentiate_chunk<T>(a, s, t, ChunkGrads<Sum>(task_sums(sums, a, s.chunks, t, each), s));
    });
    store_chunk_sums<T>(a, s, sums, each, 0, static_cast<Sum>(a.scale), a.grad_q);
    store_chunk_sums<T>(a, s, sums, each, rows, Sum(1), a.grad_v);
    for (int64_t pair = 0; pair < a.images * a.heads; ++pair) {
      LookupTask t{pair / a.heads, pair % a.heads, 0, 0, 0};
      for (int64_t m = 0; m < a.compressed; ++m) {
        Sum total = 0;
        for (t.chunk = 0; t.chunk < s.chunks; ++t.chunk) {
          total += ChunkGrads<Sum>(task_sums(sums, a, s.chunks, t, each), s).lse[m];
        }
        static_cast<Sum*>(a.grad_lse)[head_start(a, t) + m] = -total;
      }
    }
  });
}

TOKRED_KERNELS_END
