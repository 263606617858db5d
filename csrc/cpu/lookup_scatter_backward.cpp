// SPDX-License-Identifier: MIT
// The gradients of lookup attention's scatter; the equations are in args.h.
#include "lookup_head.h"

TOKRED_KERNELS_BEGIN
namespace {

// What a chunk leaves: its share of grad_q and grad_v, (queries, padded) each, and of - grad_lse.
template <class Sum>
struct ChunkGrads {
  Sum *q, *v, *lse;
  ChunkGrads(Sum* at, const LookupShape& s) : q(at), v(at + s.sums * s.padded), lse(at + 2 * s.sums * s.padded) {}
  static int64_t size(const LookupShape& s) { return 2 * s.sums * s.padded + s.queries; }
};

template <class T, class Sum>
void differentiate_chunk(const LookupScatterBackwardArgs& a, const LookupShape& s, const LookupTask& t,
                         const ChunkGrads<Sum>& grad) {
  thread_local Arena arena;
  Sum* next = arena.take<Sum>(4 * s.rows() + s.queries + 3 * s.block() + 2 * s.weights());
  const auto take = [&](int64_t number) { return std::exchange(next, next + number); };
  const Few<T, Sum> queries(a, s, t, a.q, a.q_strides, static_cast<Sum>(a.scale), take);
  const Few<T, Sum> values(a, s, t, a.v, a.v_strides, Sum(1), take);
  Sum *lse = take(s.queries), *keys = take(s.block()), *grads = take(s.block()), *grad_k = take(s.block());
  Sum *weights = take(s.weights()), *slopes = take(s.weights());

  load_lse(a, s, t, a.lse, lse);
  clear(grad.q, ChunkGrads<Sum>::size(s));
  each_key_block(s, t, [&](int64_t key, int64_t count) {
    pack_block<T>(a, s, t, key, count, a.k, a.k_strides, keys);
    pack_block<T>(a, s, t, key, count, a.grad_out, a.grad_out_strides, grads);
    multiply_panels(keys, s.padded, queries.panels, a.channels, s.queries, weights, count);
    multiply_panels(grads, s.padded, values.panels, a.channels, s.queries, slopes, count);
    for (int64_t j = 0; j < count; ++j) {
      Sum *weight = weights + j * s.queries, *slope = slopes + j * s.queries, *total = grad.lse;
      weigh_by_lse(weight, s.queries, lse);
#pragma omp simd
      for (int64_t m = 0; m < s.queries; ++m) {
        slope[m] *= weight[m];
        total[m] += slope[m];
      }
    }
    multiply_rows(slopes, s.queries, queries.rows, a.compressed, s.padded, grad_k, count);
    store_key_rows<T>(a, s, t, key, count, grad_k, a.grad_k);
    add_outer(slopes, s.queries, a.compressed, keys, s.padded, grad.q, count);
    add_outer(weights, s.queries, a.compressed, grads, s.padded, grad.v, count);
  });
}

}  // namespace

void lookup_scatter_backward(const LookupScatterBackwardArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Element<T>::Sum;
    const LookupShape s = lookup_shape<Sum>(a);
    const int64_t each = ChunkGrads<Sum>::size(s), rows = s.sums * s.padded;
    Arena arena;
    Sum* sums = arena.take<Sum>(a.images * a.heads * s.chunks * each);
    each_chunk(a, s, [&](const LookupTask& t) {
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
