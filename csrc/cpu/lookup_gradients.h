// SPDX-License-Identifier: MIT
// What the gradients of lookup attention's gather and scatter have in common: scores, and what they are made of.
#pragma once

#include "lookup_products.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// A task's memory. `few` has a row for each query and `many` for each key. For the gather they are the gradient of its
// output, and v; for the scatter, v and the gradient of its output, which is reduced too.
template <class T, bool kReduced>
struct LookupGradients {
  using Sum = typename Element<T>::Sum;
  using Products = typename LookupOf<T>::Type;
  using Few = typename Products::Few;
  using Keys = typename Products::template Block<true, true>;
  using Many = typename Products::template Block<true, kReduced>;
  using Sums = typename Products::Sums;

  Few queries, few;
  Products products;
  Keys keys;
  Many many;
  Sums sums_q;
  Sum *lse, *grad, *weights, *slopes;
  typename Products::Means means;

  static int64_t size(const LookupShape& s) {
    return 2 * Few::size(s) + Products::size(s) + Keys::size(s) + Many::size(s) + Sums::size(s) + s.queries +
           s.block() + 2 * s.weights();
  }

  template <class Take>
  LookupGradients(const LookupProblem& a, const LookupShape& s, const LookupTask& t, const void* few_data,
                  const int64_t (&few_strides)[3], const void* lse_data, Sum* grad_q, const Take& take)
      : queries(a, s, t, a.q, a.q_strides, a.scale, take),
        few(a, s, t, few_data, few_strides, 1, take),
        products(s, take),
        keys(s, take),
        many(s, take),
        sums_q(s, grad_q, take),
        lse(take(s.queries)),
        grad(take(s.block())),
        weights(take(s.weights())),
        slopes(take(s.weights())) {
    load_lse(a, s, t, lse_data, lse);
  }

  // For a block of keys, writes the weights, and the products of few and many as slopes.
  void score(const LookupProblem& a, const LookupShape& s, const LookupTask& t, int64_t key, int64_t count,
             const void* many_data, const int64_t (&many_strides)[3]) const {
    keys.load(a, s, t, key, count, a.k, a.k_strides);
    many.load(a, s, t, key, count, many_data, many_strides);
    products.score(a, s, keys, queries, count, weights);
    products.score(a, s, many, few, count, slopes);
    const Sum factor = Products::score_factor(a);
    for (int64_t j = 0; j < count; ++j) weigh_by_lse(weights + j * s.queries, s.queries, factor, lse);
  }

  // With the gradients of the block's scores as slopes: stores grad_k and adds to grad_q.
  void spread(const LookupProblem& a, const LookupShape& s, const LookupTask& t, int64_t key, int64_t count,
              void* grad_k) const {
    products.expand(a, s, slopes, queries, count, grad);
    store_key_rows<T>(a, s, t, key, count, grad, grad_k);
    products.reduce(a, s, slopes, keys, count, sums_q);
  }
};

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
