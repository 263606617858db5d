// SPDX-License-Identifier: MIT
// The gradients of lookup attention's gather; the equations are in args.h.
#include "lookup_head.h"

TOKRED_KERNELS_BEGIN
namespace {

template <class T, class Sum>
void differentiate_chunk(const LookupGatherBackwardArgs& a, const LookupShape& s, const LookupTask& t, Sum* grad_q) {
  thread_local Arena arena;
  Sum* next = arena.take<Sum>(4 * s.rows() + 2 * s.queries + 4 * s.block() + 2 * s.weights());
  const auto take = [&](int64_t number) { return std::exchange(next, next + number); };
  const Few<T, Sum> queries(a, s, t, a.q, a.q_strides, static_cast<Sum>(a.scale), take);
  const Few<T, Sum> grads(a, s, t, a.grad_out, a.grad_out_strides, Sum(1), take);
  Sum *lse = take(s.queries), *offsets = take(s.queries);
  Sum *keys = take(s.block()), *values = take(s.block()), *grad_k = take(s.block()), *grad_v = take(s.block());
  Sum *weights = take(s.weights()), *slopes = take(s.weights());

  load_lse(a, s, t, a.lse, lse);
  clear(offsets, s.queries);
  for (int64_t m = 0; m < a.compressed; ++m) {
    const T* out = result_row<const T>(const_cast<void*>(a.out), a, a.compressed, t, m);
    if (a.grad_lse) offsets[m] = static_cast<const Sum*>(a.grad_lse)[head_start(a, t) + m];
    for (int64_t c = 0; c < a.channels; ++c) offsets[m] -= grads.rows[m * s.padded + c] * Element<T>::load(out[c]);
  }
  clear(grad_q, s.sums * s.padded);
  each_key_block(s, t, [&](int64_t key, int64_t count) {
    pack_block<T>(a, s, t, key, count, a.k, a.k_strides, keys);
    pack_block<T>(a, s, t, key, count, a.v, a.v_strides, values);
    multiply_panels(keys, s.padded, queries.panels, a.channels, s.queries, weights, count);
    multiply_panels(values, s.padded, grads.panels, a.channels, s.queries, slopes, count);
    for (int64_t j = 0; j < count; ++j) {
      Sum *weight = weights + j * s.queries, *slope = slopes + j * s.queries;
      weigh_by_lse(weight, s.queries, lse);
#pragma omp simd
      for (int64_t m = 0; m < s.queries; ++m) slope[m] = weight[m] * (slope[m] + offsets[m]);
    }
    multiply_rows(slopes, s.queries, queries.rows, a.compressed, s.padded, grad_k, count);
    store_key_rows<T>(a, s, t, key, count, grad_k, a.grad_k, a.onto_k);
    multiply_rows(weights, s.queries, grads.rows, a.compressed, s.padded, grad_v, count);
    store_key_rows<T>(a, s, t, key, count, grad_v, a.grad_v);
    add_outer(slopes, s.queries, a.compressed, keys, s.padded, grad_q, count);
  });
}

}  // namespace

void lookup_gather_backward(const LookupGatherBackwardArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Element<T>::Sum;
    const LookupShape s = lookup_shape<Sum>(a);
    const int64_t each = s.sums * s.padded;
    Arena arena;
    Sum* sums = arena.take<Sum>(a.images * a.heads * s.chunks * each);
    each_chunk(a, s,
               [&](const LookupTask& t) { differentiate_chunk<T>(a, s, t, task_sums(sums, a, s.chunks, t, each)); });
    store_chunk_sums<T>(a, s, sums, each, 0, static_cast<Sum>(a.scale), a.grad_q);
  });
}

TOKRED_KERNELS_END
