// SPDX-License-Identifier: MIT
// The gradients of lookup attention's gather; the equations are in args.h.
#include "lookup_head.h"

TOKRED_KERNELS_BEGIN
namespace {

template <class T, class Sum>
void differentiate_chunk(const LookupGatherBackwardArgs& a, const LookupShape& s, const LookupTask& t, Sum* grad_q) {
  const int64_t block = kKeyBlock * s.padded, panel = kKeyBlock * a.channels, all = s.queries * s.padded;
  thread_local Arena arena;
  Sum* next = arena.take<Sum>(2 * all + s.queries + 3 * block + 2 * panel + kQueryBlock * (2 * kKeyBlock + s.padded));
  const auto take = [&](int64_t values) { return std::exchange(next, next + values); };
  Sum *queries = take(all), *grads = take(all);
  Sum *keys = take(block), *grad_k = take(block), *grad_v = take(block);
  Sum *key_panels = take(panel), *value_panels = take(panel);
  Sum *weights = take(kQueryBlock * kKeyBlock), *slopes = take(kQueryBlock * kKeyBlock);
  Sum* partial = take(kQueryBlock * s.padded);
  Sum* offsets = take(s.queries);  // last, for it is no multiple of a vector
  const Sum scale = static_cast<Sum>(a.scale);
  const Sum* lse = static_cast<const Sum*>(a.lse) + head_start(a, t);

  pack_rows(strided_row<T>(a.q, a.q_strides, t, 0), a.q_strides[2], a.compressed, a.channels, s.queries, s.padded,
            queries);
  pack_rows(strided_row<T>(a.grad_out, a.grad_out_strides, t, 0), a.grad_out_strides[2], a.compressed, a.channels,
            s.queries, s.padded, grads);
  for (int64_t m = 0; m < a.compressed; ++m) {
    const T* out = result_row<const T>(const_cast<void*>(a.out), a, a.compressed, t, m);
    Sum offset = a.grad_lse ? static_cast<const Sum*>(a.grad_lse)[head_start(a, t) + m] : Sum(0);
    for (int64_t c = 0; c < a.channels; ++c) offset -= grads[m * s.padded + c] * Element<T>::load(out[c]);
    offsets[m] = offset;
  }
  const int64_t stride = a.heads * a.channels, sum_strides[] = {a.tokens * stride, a.channels, stride};
  clear(grad_q, all);
  each_key_block(t, [&](int64_t key, int64_t number) {
    pack_rows(strided_row<T>(a.v, a.v_strides, t, key), a.v_strides[2], number, a.channels, kKeyBlock, s.padded, keys);
    pack_panels(keys, kKeyBlock, a.channels, s.padded, value_panels);
    pack_rows(strided_row<T>(a.k, a.k_strides, t, key), a.k_strides[2], number, a.channels, kKeyBlock, s.padded, keys);
    pack_panels(keys, kKeyBlock, a.channels, s.padded, key_panels);
    clear(grad_k, block);
    clear(grad_v, block);
    NextRows<T> next_keys(a, t, key, a.k, a.k_strides), next_values(a, t, key, a.v, a.v_strides);
    NextRows<T> next_sums(a, t, key, a.grad_k, sum_strides);
    each_query_block(a, [&](int64_t query, int64_t count) {
      const Sum *q = queries + query * s.padded, *g = grads + query * s.padded;
      multiply_panels(q, s.padded, key_panels, a.channels, kKeyBlock, weights, count);
      multiply_panels(g, s.padded, value_panels, a.channels, kKeyBlock, slopes, count);
      for (int64_t m = 0; m < count; ++m) {
        next_keys.fetch_some();
        next_values.fetch_some();
        if (a.onto_k) next_sums.fetch_some();
        Sum *weight = weights + m * kKeyBlock, *slope = slopes + m * kKeyBlock;
        const Sum offset = offsets[query + m];
        weigh_by_lse(weight, number, scale, lse[query + m]);
#pragma omp simd
        for (int64_t j = 0; j < number; ++j) slope[j] = weight[j] * (slope[j] + offset);
      }
      multiply_rows(slopes, kKeyBlock, keys, number, s.padded, partial, count);
      add_rows(partial, count * s.padded, grad_q + query * s.padded);
      add_outer(slopes, kKeyBlock, number, q, s.padded, grad_k, count);
      add_outer(weights, kKeyBlock, number, g, s.padded, grad_v, count);
    });
    store_key_rows<T>(a, s, t, key, number, grad_k, scale, a.grad_k, a.onto_k);
    store_key_rows<T>(a, s, t, key, number, grad_v, Sum(1), a.grad_v);
  });
}

}  // namespace

void lookup_gather_backward(const LookupGatherBackwardArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Element<T>::Sum;
    const LookupShape s = lookup_shape<Sum>(a);
    const int64_t each = s.queries * s.padded;
    std::vector<Sum> sums(a.images * a.heads * s.chunks * each);
    each_chunk(a, s.chunks,
               [&](const LookupTask& t) { differentiate_chunk<T>(a, s, t, task_sums(sums, a, s.chunks, t, each)); });
    store_chunk_sums<T>(a, s, sums, each, 0, static_cast<Sum>(a.scale), a.grad_q);
  });
}

TOKRED_KERNELS_END
