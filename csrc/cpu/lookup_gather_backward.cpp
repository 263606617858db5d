// SPDX-License-Identifier: MIT
// The gradients of lookup attention's gather; the equations are in args.h.
#include <optional>

#include "lookup_gradients.h"

TOKRED_KERNELS_BEGIN
namespace {

// What a scatter by the same weights adds to the gradients of the scores.
template <class T>
struct ScatterShare {
  using Sum = typename Element<T>::Sum;
  using Products = typename LookupOf<T>::Type;
  using Grads = typename Products::template Block<true, false>;

  typename Products::Few values;
  Grads grads;
  Sum* slopes;

  static int64_t size(const LookupShape& s) { return Products::Few::size(s) + Grads::size(s) + s.weights(); }

  template <class Take>
  ScatterShare(const LookupGatherBackwardArgs& a, const LookupShape& s, const LookupTask& t, const Take& take)
      : values(a, s, t, a.scatter_v, a.scatter_v_strides, 1, take), grads(s, take), slopes(take(s.weights())) {}

  void score(const LookupGatherBackwardArgs& a, const LookupShape& s, const LookupTask& t, int64_t key, int64_t count,
             const Products& products) const {
    grads.load(a, s, t, key, count, a.scatter_grad, a.scatter_grad_strides);
    products.score(a, s, grads, values, count, slopes);
  }
};

template <class T, class Sum>
void differentiate_chunk(const LookupGatherBackwardArgs& a, const LookupShape& s, const LookupTask& t, Sum* grad_q) {
  using Gradients = LookupGradients<T, false>;
  using Share = ScatterShare<T>;
  thread_local Arena arena;
  Sum* next = arena.take<Sum>(Gradients::size(s) + Share::size(s) + s.queries);
  const auto take = [&](int64_t number) { return std::exchange(next, next + number); };
  const Gradients g(a, s, t, a.grad_out, a.grad_out_strides, a.lse, grad_q, take);
  Sum* offsets = take(s.queries);
  std::optional<Share> share;
  if (a.scatter_v) share.emplace(a, s, t, take);

  clear(offsets, s.queries);
  for (int64_t m = 0; m < a.compressed; ++m) {
    const T* out = result_row<const T>(const_cast<void*>(a.out), a, a.compressed, t, m);
    const T* grad_out = strided_row<T>(a.grad_out, a.grad_out_strides, t, m);
    if (a.grad_lse) offsets[m] = static_cast<const Sum*>(a.grad_lse)[head_start(a, t) + m];
    for (int64_t c = 0; c < a.channels; ++c) offsets[m] -= Element<T>::load(grad_out[c]) * Element<T>::load(out[c]);
  }
  const Sum factor = Gradients::Products::score_factor(a);
  each_key_block(s, t, [&](int64_t key, int64_t count) {
    g.score(a, s, t, key, count, a.v, a.v_strides);
    if (share) {
      share->score(a, s, t, key, count, g.products);
      Sum* slopes = g.slopes;
      const Sum* more = share->slopes;
#pragma omp simd
      for (int64_t i = 0; i < count * s.queries; ++i) slopes[i] += more[i];
    }
    for (int64_t j = 0; j < count; ++j) {
      const Sum* weight = g.weights + j * s.queries;
      Sum* slope = g.slopes + j * s.queries;
#pragma omp simd
      for (int64_t m = 0; m < s.queries; ++m) slope[m] = weight[m] * (slope[m] + offsets[m]) * factor;
    }
    g.spread(a, s, t, key, count, a.grad_k);
    g.products.expand(a, s, g.weights, g.few, count, g.grad);
    store_key_rows<T>(a, s, t, key, count, g.grad, a.grad_v);
  });
  g.sums_q.finish(a, s);
}

}  // namespace

void lookup_gather_backward(const LookupGatherBackwardArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Element<T>::Sum;
    using Products = typename LookupOf<T>::Type;
    const LookupShape s = lookup_shape<Products>(a);
    const int64_t each = s.sums * s.padded;
    Arena arena;
    Sum* sums = arena.take<Sum>(a.images * a.heads * s.chunks * each);
    each_chunk(a, s,
               [&](const LookupTask& t) { differentiate_chunk<T>(a, s, t, task_sums(sums, a, s.chunks, t, each)); });
    store_chunk_sums<T>(a, s, sums, each, 0, Products::sum_factor(a), a.grad_q);
  });
}

TOKRED_KERNELS_END
